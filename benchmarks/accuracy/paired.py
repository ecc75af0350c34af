"""Differences between policies on the same items, with 95 % bootstrap intervals.

    python benchmarks/accuracy/paired.py RESULTS/results.jsonl

Of `vlcache eval`'s results, items that the full cache answers right. A difference within items has
a narrower interval than the two shares of report.md beside each other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
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
    "tuned - VL-Cache": ("tuned", "vl_cache"),
    "tuned - SnapKV": ("tuned", "snapkv"),
    "VL-Cache - SnapKV": ("vl_cache", "snapkv"),
}


def survivals(results: Iterable[dict[str, Any]], variant: str, budget: float) -> np.ndarray:
    """Of each item that the full cache answers right, 1 where this variant does as well."""
    found = []
    for item in results:
        right = {(x["variant"], x["budget"]): x["exact"] for x in item["rows"]}
        if right["full", 1.0]:
            found.append(float(right[variant, budget]))
    return np.array(found)


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """The mean of a - b, and its 95 % percentile interval over resampled items."""
    gains = a - b
    items = np.random.default_rng(0).integers(len(gains), size=(RESAMPLES, len(gains)))
    low, high = np.percentile(gains[items].mean(1), [2.5, 97.5])
    return float(gains.mean()), float(low), float(high)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, in points."""
    lines = ["| survive | " + " | ".join(f"{b:.0%}" for b in BUDGETS) + " |"]
    lines.append("|---|" + "---:|" * len(BUDGETS))
    for name, (a, b) in PAIRS.items():
        cells = []
        for budget in BUDGETS:
            found = difference(*(survivals(results, x, budget) for x in (a, b)))
            mean, low, high = (100 * x for x in found)
            cells.append(f"{mean:+.1f} ({low:.1f} to {high:.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(read_results(Path(sys.argv[1]))))
