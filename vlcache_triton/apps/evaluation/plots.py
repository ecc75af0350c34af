"""The results as pictures: a curve for each variant over the budgets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .markdown import ABLATION
from .summary import Cell, names, pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {
    "retained": "exact match, of what the full cache answers",
    "anls": "ANLS",
    "agreement": "tokens as with the full cache",
    "hit_rate": "cache hit rate",
}
EMPHASISED = {"vl_cache", "tuned", "hindsight"}
COLOURS = [f"C{i}" for i in range(10) if i != 7]  # C7 is grey, as the full cache is
TICK_ROOM = 0.075  # of the axis's width, from the middle of one tick's text to that of the next


def plot(cells: Sequence[Cell], suite: str, path: Path) -> None:
    """Write the curves of one suite; the file's suffix says the format."""
    draw_curves(cells, suite).savefig(path, dpi=130)


def draw_curves(cells: Sequence[Cell], suite: str) -> Figure:
    """A panel for each metric, in it a curve for each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 2).flat
    here = [c for c in cells if c.suite == suite]
    cells_left_out = {name for key, name in ABLATION.items() if name != "vl_cache"}
    variants = [v for v in names(here, "variant") if v not in cells_left_out and v != "full"]
    bases = dict.fromkeys(map(_base, variants))
    colours = dict(zip(bases, cycle(COLOURS), strict=False))
    for axes, (metric, label) in zip(panels, METRICS.items(), strict=True):
        for variant in variants:
            colour, dashes = colours[_base(variant)], "-" if variant == _base(variant) else "--"
            points = [c for c in here if c.variant == variant and getattr(c, metric) is not None]
            points.sort(key=lambda cell: cell.budget)
            x, y = [c.budget for c in points], [getattr(c, metric) for c in points]
            width = 2.2 if variant in EMPHASISED else 1.1
            axes.plot(x, y, color=colour, ls=dashes, marker="o", ms=3, lw=width, label=variant)
            if metric == "retained" and variant in ("vl_cache", "tuned"):
                low, high = [c.retained_low for c in points], [c.retained_high for c in points]
                axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        full = pick(here, suite, "full", 1.0)
        if full is not None and getattr(full, metric) is not None:
            axes.axhline(getattr(full, metric), color="0.6", lw=1, ls="--", label="full cache")
        _mark_budgets(axes, sorted({c.budget for c in here}))
        axes.set(xlabel="kept of the cache", ylabel=label, ylim=(-0.02, 1.02))
        axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 8), fontsize=8
    )
    num_items = max((c.num_items for c in here), default=0)
    figure.suptitle(f"{suite}: {num_items} items (shaded: 95 % interval)")
    return figure


def _mark_budgets(axes: Any, budgets: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each budget, and its text where there is room for it."""
    low, high = 0.9 * budgets[0], 1.1 * budgets[-1]
    room = TICK_ROOM * log(high / low)
    texts: list[str] = []
    written = high * exp(room)
    for budget in reversed(budgets):
        has_room = log(written / budget) >= room
        texts.insert(0, f"{100 * budget:.3g}%" if has_room else "")
        written = budget if has_room else written
    axes.set_xscale("log")
    axes.set_xticks(budgets, texts)
    axes.set_xlim(low, high)
    axes.minorticks_off()


def _base(variant: str) -> str:
    """The variant that this one is, but for a row for what is evicted, which it has or lacks."""
    return variant.removesuffix(", a row").removesuffix(", no row")
