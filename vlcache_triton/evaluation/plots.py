"""The results as pictures: a curve for each variant over the budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .markdown import ABLATION
from .summary import Cell, names, pick

METRICS = {
    "retained": "exact match, of what the full cache answers",
    "anls": "ANLS",
    "agreement": "tokens as with the full cache",
    "hit_rate": "cache hit rate",
}
EMPHASISED = {"vl_cache", "tuned", "hindsight"}


def plot(cells: Sequence[Cell], suite: str, path: Path) -> None:
    """Write the curves of one suite, a panel for each metric; the file's suffix says the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 2).flat
    here = [c for c in cells if c.suite == suite]
    cells_left_out = {name for key, name in ABLATION.items() if name != "vl_cache"}
    variants = [v for v in names(here, "variant") if v not in cells_left_out and v != "full"]
    for axes, (metric, label) in zip(panels, METRICS.items(), strict=True):
        for variant in variants:
            points = [c for c in here if c.variant == variant and getattr(c, metric) is not None]
            points.sort(key=lambda cell: cell.budget)
            x, y = [c.budget for c in points], [getattr(c, metric) for c in points]
            is_ours = variant in EMPHASISED
            axes.plot(x, y, marker="o", ms=3, lw=2.2 if is_ours else 1.1, label=variant)
            if metric == "retained" and variant in ("vl_cache", "tuned"):
                low, high = [c.retained_low for c in points], [c.retained_high for c in points]
                axes.fill_between(x, low, high, alpha=0.15, lw=0)
        full = pick(here, suite, "full", 1.0)
        if full is not None and getattr(full, metric) is not None:
            axes.axhline(getattr(full, metric), color="0.6", lw=1, ls="--", label="full cache")
        axes.set_xscale("log")
        ticks = sorted({c.budget for c in here})
        axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel="kept of the cache", ylabel=label, ylim=(-0.02, 1.02))
        axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2)
    num_items = max((c.num_items for c in here), default=0)
    figure.suptitle(f"{suite}: {num_items} items (shaded: 95 % interval)")
    figure.savefig(path, dpi=130)
