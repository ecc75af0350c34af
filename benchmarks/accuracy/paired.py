"""Differences between policies on the same items, with 95 % bootstrap intervals.

    python benchmarks/accuracy/paired.py RESULTS/results.jsonl

Of `vlcache eval`'s results, items that the full cache answers right, in the mean of the tasks. A
difference within items has a narrower interval than the two shares of report.md beside each other.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlcache_triton.apps.evaluation.run import read_results

BUDGETS = (0.05, 0.1, 0.2, 0.4)
RESAMPLES = 10_000
#: What is taken from what.
PAIRS = {
    "post-vision - all-row scores, sparsity-aware layers": ("vl_cache", "all rows, sparsity-aware"),
    "post-vision - all-row scores, uniform layers": ("post-vision, uniform", "all rows, uniform"),
    "sparsity-aware - uniform layers, post-vision scores": ("vl_cache", "post-vision, uniform"),
    "sparsity-aware - uniform layers, all-row scores": (
        "all rows, sparsity-aware",
        "all rows, uniform",
    ),
    "one set a layer - one a KV head, VL-Cache": ("vl_cache, one set a layer", "vl_cache"),
    "literal - exact clipping, VL-Cache": ("vl_cache, literal clipping", "vl_cache"),
    "a row - none, VL-Cache": ("vl_cache, a row", "vl_cache"),
    "a row - none, VL-Cache, one set a layer": (
        "vl_cache, one set a layer, a row",
        "vl_cache, one set a layer",
    ),
    "a row - none, SnapKV tuned": ("snapkv, tuned, a row", "snapkv, tuned"),
    "a row - none, tuned": ("tuned", "tuned, no row"),
    "a row - none, random": ("random, a row", "random"),
    "a profile - none, VL-Cache": ("vl_cache, calibrated", "vl_cache"),
    "a profile - none, tuned": ("tuned, calibrated", "tuned"),
    "tuned - VL-Cache": ("tuned", "vl_cache"),
    "tuned - VL-Cache, both with a row": ("tuned", "vl_cache, a row"),
    "tuned - SnapKV tuned": ("tuned", "snapkv, tuned"),
    "tuned - SnapKV tuned, both with a row": ("tuned", "snapkv, tuned, a row"),
    "SnapKV tuned - SnapKV": ("snapkv, tuned", "snapkv"),
    "VL-Cache - SnapKV": ("vl_cache", "snapkv"),
}


def survivals(results: Iterable[dict[str, Any]], variant: str, budget: float) -> list[np.ndarray]:
    """For each task, of each item that the full cache answers right, 1 where this variant does."""
    found: dict[str, list[float]] = defaultdict(list)
    for item in results:
        right = {(x["variant"], x["budget"]): x["exact"] for x in item["rows"]}
        if right["full", 1.0]:
            found[item["suite"]].append(float(right[variant, budget]))
    return [np.array(task) for task in found.values()]


def difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """The mean over the tasks of the mean of a - b, and its 95 % percentile interval over items
    resampled within their tasks."""
    rng = np.random.default_rng(0)
    gains = [x - y for x, y in zip(a, b, strict=True)]
    means = [g[rng.integers(len(g), size=(RESAMPLES, len(g)))].mean(1) for g in gains]
    low, high = np.percentile(np.mean(means, 0), [2.5, 97.5])
    return float(np.mean([g.mean() for g in gains])), float(low), float(high)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, in points; the pairs and budgets that were measured."""
    measured = {(row["variant"], row["budget"]) for item in results for row in item["rows"]}
    budgets = [b for b in BUDGETS if any(b == budget for _, budget in measured)]
    lines = ["| survive | " + " | ".join(f"{b:.0%}" for b in budgets) + " |"]
    lines.append("|---|" + "---:|" * len(budgets))
    for name, pair in PAIRS.items():
        if not {(variant, budget) for variant in pair for budget in budgets} <= measured:
            continue
        cells = []
        for budget in budgets:
            found = difference(*(survivals(results, variant, budget) for variant in pair))
            mean, low, high = (100 * x for x in found)
            cells.append(f"{mean:+.1f} ({low:.1f} to {high:.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(read_results(Path(sys.argv[1]))))
