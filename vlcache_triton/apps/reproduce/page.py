"""All parts as one page, with its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from ..evaluation.markdown import percent, table
from ..evaluation.summary import names
from ..evaluation.variants import FULL
from . import plots
from .scores import Score
from .variants import ABLATED


@dataclass(frozen=True)
class Findings:
    """What the parts have; empty where a part was not asked for.

    about: of the run, by what it is called. accuracy, ablation: scores, the full cache's among
    them. sparsity: as `measure_sparsity`, latency: rows as `measure_latency` returns them.
    failed: what could not be measured, and why.
    """

    about: dict[str, Any]
    accuracy: Sequence[Score] = ()
    ablation: Sequence[Score] = ()
    sparsity: dict[str, list[list[float]]] = field(default_factory=dict)
    latency: Sequence[dict[str, Any]] = ()
    failed: Sequence[str] = ()


def write_page(findings: Findings, folder: Path) -> str:
    """Write report.md and its figures into the folder; the page's text comes back."""
    parts = ["# VL-Cache, reproduced"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in findings.about.items()))
    sections: list[tuple[str, Any, Callable[..., Any], Callable[..., str]]] = [
        ("Accuracy by budget", findings.accuracy, plots.accuracy, _accuracy),
        ("The recipe's choices", findings.ablation, plots.ablation, _ablation),
        ("Sparsity by layer", findings.sparsity, plots.sparsity, _sparsity),
        ("Latency", findings.latency, plots.latency, _latency),
    ]
    for title, found, draw, text in sections:
        if found:
            name = title.lower().replace("'", "").replace(" ", "-") + ".png"
            draw(found).savefig(folder / name, dpi=110)
            parts += [f"## {title}", f"![{title}]({name})", text(found)]
    if findings.failed:
        parts += ["## Not measured", "\n".join(f"- {reason}" for reason in findings.failed)]
    page = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(page, encoding="utf-8")
    return page


def _accuracy(scores: Sequence[Score]) -> str:
    tables = []
    for task in names(scores, "task"):
        here = [s for s in scores if s.task == task and s.variant != FULL]
        budgets = sorted(names(here, "budget"))
        rows = [
            [variant, *(_value(here, task, variant, budget) for budget in budgets)]
            for variant in names(here, "variant")
        ]
        tables += [_head(scores, task), table(["kept", *map(percent, budgets)], rows)]
    return "\n\n".join(tables)


def _ablation(scores: Sequence[Score]) -> str:
    """A table for each choice: its values by tasks, at each budget."""
    tasks = names(scores, "task")
    tables = ["Each choice alone; the others as in the paper."]
    tables += [_head(scores, task) for task in tasks]
    for budget in sorted({s.budget for s in scores if s.variant != FULL}):
        for name, values in ABLATED.items():
            rows = [
                [str(value), *(_value(scores, x, f"{name}={value}", budget) for x in tasks)]
                for value in values
            ]
            tables.append(table([f"{name}, at {percent(budget)}", *tasks], rows))
    return "\n\n".join(tables)


def _head(scores: Sequence[Score], task: str) -> str:
    full = next(s for s in scores if (s.task, s.variant) == (task, FULL))
    return f"**{task}**, {full.metric}; with the full cache {full.value:.3f}."


def _value(scores: Sequence[Score], task: str, variant: str, budget: float) -> str:
    found = next((s for s in scores if s[:3] == (task, variant, budget)), None)
    if found is None:
        return ""
    interval = "" if found.low is None else f" ({found.low:.2f} to {found.high:.2f})"
    return f"{found.value:.3f}{interval}"


def _sparsity(found: dict[str, list[list[float]]]) -> str:
    number = ", ".join(f"{len(prompts)} in {phase}" for phase, prompts in found.items())
    said = f"γ' (eq. 2), mean over the prompts ± their standard deviation; prompts: {number}."
    phases = {phase: list(zip(*prompts, strict=True)) for phase, prompts in found.items()}
    rows = [
        [str(layer), *(_spread(layers[layer]) for layers in phases.values() if layers)]
        for layer in range(max(map(len, phases.values())))
    ]
    head = ["layer", *(phase for phase, layers in phases.items() if layers)]
    return said + "\n\n" + table(head, rows)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ± {pstdev(values):.3f}"


def _latency(rows: Sequence[dict[str, Any]]) -> str:
    head = ["batch x prompt", "loop", "kept", "prefill, s", "ms a token", "all, s", "KV, MB"]
    head += ["peak, MB", "decoding, times as fast", "all, times as fast"]
    base = {(r["batch"], r["length"]): r for r in rows if r["loop"] == "transformers"}
    cells = []
    for row in rows:
        stock = base[row["batch"], row["length"]]
        cells.append(
            [
                f"{row['batch']} x {row['length']}",
                row["loop"],
                percent(row["budget"]),
                f"{row['prefill_s']:.3f}",
                f"{row['token_ms']:.2f}",
                f"{row['total_s']:.3f}",
                *(
                    "" if row[key] is None else f"{row[key] / 1e6:.1f}"
                    for key in ("kv_bytes", "peak_bytes")
                ),
                f"{stock['token_ms'] / row['token_ms']:.2f}",
                f"{stock['total_s'] / row['total_s']:.2f}",
            ]
        )
    said = (
        f"{rows[0]['new_tokens']} new tokens. 'transformers' is its own loop; what a captured loop"
        " brings and what compression brings are in one row each."
    )
    return said + "\n\n" + table(head, cells)
