"""pytest-benchmark's JSON files as one Markdown page and two plots.

    python benchmarks/report.py benchmarks/results    # reads gpu_*.json there, writes beside them

Speedups are ratios of entries that passed their check against the reference in the same run; what
failed has no entry and so no number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KV_ROW = 2 * 128 * 2  # bytes of K and V of one token and head: d = 128, two bytes each
Rows = list[dict[str, Any]]


def load(folder: Path) -> dict[str, Rows]:
    """extra_info of every entry, by the test that made it."""
    tests: dict[str, Rows] = {}
    for file in sorted(folder.glob("gpu_*.json")):
        for entry in json.loads(file.read_text()).get("benchmarks", []):  # a sweep has none
            name = entry["name"].split("[")[0].removeprefix("test_")
            tests.setdefault(name, []).append(entry["extra_info"])
    return tests


def table(rows: Rows, columns: dict[str, str]) -> str:
    """Markdown; `columns` maps headings to formats of a row's facts."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (form.format(**row) for form in columns.values())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def decode_tables(rows: Rows) -> str:
    """One table a layout; the last column compares with the fastest peer at the same shape."""
    facts = ("layout", "num_seqs", "length", "num_kv_heads")
    for row in rows:
        same = [x for x in rows if all(x[f] == row[f] for f in facts)]
        peers = [x["microseconds"] for x in same if not x["peer"].startswith("ours")]
        is_ours = row["peer"] == "ours" and peers
        row["speedup"] = f"{min(peers) / row['microseconds']:.2f}x" if is_ours else ""
        row["mb"] = row["nbytes"] / 1e6
    return table(
        rows,
        {
            "layout": "{layout}",
            "B x n": "{num_seqs} x {length}",
            "KV heads": "{num_kv_heads}",
            "MB": "{mb:.0f}",
            "by": "{peer}",
            "µs": "{microseconds:.1f}",
            "GB/s": "{gigabytes_per_second:.0f}",
            "% of copy": "{percent_of_copy_rate:.0f}",
            "against best peer": "{speedup}",
        },
    )


def cache_table(rows: Rows) -> str:
    """Decoding where capacity, pages and lengths are as adapters bring them."""
    for row in rows:
        row["floor"] = row["nbytes"] / row["copy_rate"] / 1e3
    return table(
        rows,
        {
            "cache": "{cache}",
            "sequences": "{num_seqs}",
            "longest, live": "{length}",
            "capacity": "{capacity}",
            "by": "{peer}",
            "µs": "{microseconds:.1f}",
            "its bytes at the copy rate, µs": "{floor:.1f}",
        },
    )


def kernel_table(rows: Rows) -> str:
    """Statistics, selection, compaction."""
    for row in rows:
        row.setdefault("num_seqs", 1)
        row["floor"] = row["nbytes"] / row["copy_rate"] / 1e3
    return table(
        rows,
        {
            "B x n": "{num_seqs} x {length}",
            "by": "{peer}",
            "µs": "{microseconds:.1f}",
            "its bytes at the copy rate, µs": "{floor:.1f}",
        },
    )


def end_to_end_table(rows: Rows) -> str:
    """One row a shape and runner, with the two speedups against Transformers' default loop."""
    shapes = dict.fromkeys((x["num_seqs"], x["length"]) for x in rows)
    rows = [x for shape in shapes for x in rows if (x["num_seqs"], x["length"]) == shape]
    default = {(x["num_seqs"], x["length"]): x for x in rows if x["peer"] == "default"}
    for row in rows:
        base = default.get((row["num_seqs"], row["length"]))
        row["decode_x"] = f"{base['token_ms'] / row['token_ms']:.2f}x" if base else ""
        row["total_x"] = f"{base['total_s'] / row['total_s']:.2f}x" if base else ""
        is_compressed = row["peer"].startswith(("lean", "stock")) and row["budget"] < 1
        row["overhead"] = f"{row['overhead_percent']:.2f}" if is_compressed else ""
    return table(
        rows,
        {
            "B x prompt": "{num_seqs} x {length}",
            "by": "{peer}",
            "prefill ms": "{prefill_ms:.0f}",
            "compression % of prefill": "{overhead}",
            "ms a token": "{token_ms:.2f}",
            "roofline": "{roofline_ms:.2f}",
            "times it": "{times_roofline:.2f}",
            "100 tokens, s": "{total_s:.2f}",
            "resident MiB": "{resident_mib:.0f}",
            "peak MiB": "{peak_mib:.0f}",
            "decode": "{decode_x}",
            "end to end": "{total_x}",
        },
    )


def concurrency_table(rows: Rows) -> str:
    """How many sequences decoded together."""
    return table(
        rows,
        {
            "budget": "{budget}",
            "prompts": "{num_prompts} x {length}",
            "memory GiB": "{memory_gib:.0f}",
            "peak GiB": "{peak_gib:.1f}",
            "ms a step": "{step_ms:.1f}",
            "tokens as when alone": "{equal_tokens:.0%}",
        },
    )


def plot_decode(rows: Rows, file: Path) -> None:
    """Share of the copy rate by bytes of K and V."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    rows = [x for x in rows if x["layout"] == "packed"]
    for peer in dict.fromkeys(x["peer"] for x in rows):
        mine = sorted(
            (x["nbytes"] / 1e6, x["percent_of_copy_rate"]) for x in rows if x["peer"] == peer
        )
        axes.plot(
            *zip(*mine, strict=True), marker="o", label=peer, zorder=3 if peer == "ours" else 2
        )
    axes.set(xscale="log", xlabel="MB of K and V", ylabel="% of the measured copy rate", ylim=0)
    axes.set_title(f"Decode attention, {rows[0]['gpu']}")
    axes.legend()
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def plot_tokens(rows: Rows, file: Path) -> None:
    """ms a token by shape: the roofline, and what comes on top of it."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4))
    peers = list(dict.fromkeys(x["peer"] for x in rows))
    shapes = list(dict.fromkeys((x["num_seqs"], x["length"]) for x in rows))
    width = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        mine = [x for x in rows if x["peer"] == peer]
        place = [shapes.index((x["num_seqs"], x["length"])) + i * width for x in mine]
        floor = [min(x["roofline_ms"], x["token_ms"]) for x in mine]
        rest = [x["token_ms"] - y for x, y in zip(mine, floor, strict=True)]
        axes.bar(place, floor, width, color="0.3", label=None if i else "roofline")
        axes.bar(place, rest, width, bottom=floor, color=f"C{i}", label=peer)
    axes.set_xticks([x + 0.4 for x in range(len(shapes))], [f"{b}x{n}" for b, n in shapes])
    axes.set(ylabel="ms a token", title=f"Decoding, LLaVA-1.6-Mistral-7B, {rows[0]['gpu']}")
    axes.legend()
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def write(folder: Path) -> None:
    """report.md, and the plots for which there are numbers."""
    tests = load(folder)
    if not tests:
        raise SystemExit(f"{folder}: no gpu_*.json with benchmarks in it")
    # Concurrency alone measures no copy rate.
    first = next((x for rows in tests.values() for x in rows if "copy_rate" in x), {})
    keys = ("gpu", "clocks.sm,max,mem,driver", "torch", "triton", "commit", "date", "method")
    facts = " · ".join(f"{key}: {first[key]}" for key in keys if key in first)
    rate = first.get("copy_rate", 0)
    parts = [f"# Measured on one GPU\n\n{facts} · copy rate: {rate:.0f} GB/s\n"]
    sections = {
        "caches": ("Decode attention on the caches of adapters", cache_table),
        "combination": ("The combination of splits alone", cache_table),
        "decode": ("Decode attention", decode_tables),
        "score": ("Statistics of one layer, 50 query rows", kernel_table),
        "select": ("Selection, 32 layers", kernel_table),
        "select_even": ("Selection of one number from each of 256 segments", kernel_table),
        "compact": ("Compaction, 32 layers", kernel_table),
        "end_to_end": ("LLaVA-1.6-Mistral-7B, 100 new tokens", end_to_end_table),
        "concurrency": ("8K-token prompts decoded together", concurrency_table),
    }
    for name, (title, make) in sections.items():
        if name in tests:
            parts.append(f"## {title}\n\n{make(tests[name])}")
    (folder / "gpu_report.md").write_text("\n".join(parts))
    if any(x["layout"] == "packed" for x in tests.get("decode", [])):
        plot_decode(tests["decode"], folder / "gpu_decode.png")
    if "end_to_end" in tests:
        plot_tokens(tests["end_to_end"], folder / "gpu_tokens.png")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
