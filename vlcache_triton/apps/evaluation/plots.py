"""The results as pictures: the one to look at first, and a curve for each variant and metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, cycle
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .markdown import LEFT_OUT
from .summary import Cell, names, pick
from .variants import FLOOR, FULL, ORACLE, OURS, PAPER, PEER, WITH_ROW, base_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {
    "retained": "exact match, of what the full cache answers",
    "anls": "ANLS",
    "agreement": "tokens as with the full cache",
    "hit_rate": "cache hit rate",
}
EMPHASISED = {PAPER, OURS, ORACLE}
TICK_ROOM = 0.075  # of the axis's width, from the middle of one tick's text to that of the next
#: The curves of the first figure: variant, what it is called there, colour.
FIRST = (
    (OURS, "ours, tuned", "C0"),
    (PEER, "SnapKV, tuned", "C1"),
    (PAPER, "VL-Cache as published", "C3"),
    (FLOOR, "random", "0.35"),
)


def plot_first(cells: Sequence[Cell], path: Path) -> None:
    """Write the figure that says most: exact answers against the budget, in the mean of the tasks
    (or of the one task there is), for the paper, the best peer, ours, and random tokens."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vlcache"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        draw_first(cells).savefig(path, dpi=130, metadata=metadata)


def draw_first(cells: Sequence[Cell]) -> Figure:
    """A curve each, with its 95 % interval; dashed where a row stands for what is evicted, in ours
    always."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    suite = names(cells, "suite")[-1]
    here = [c for c in cells if c.suite == suite]
    for variant, label, colour in FIRST:
        line = _points(here, variant, "exact")
        axes.plot(*_xy(line, "exact"), color=colour, marker="o", ms=4, lw=2, label=label)
        low, high = [c.exact_low for c in line], [c.exact_high for c in line]
        axes.fill_between([c.budget for c in line], low, high, color=colour, alpha=0.12, lw=0)
        with_row = _points(here, variant + WITH_ROW, "exact")
        if with_row:
            label = f"{label}, with our row"
            axes.plot(*_xy(with_row, "exact"), color=colour, ls="--", lw=1.2, label=label)
    full = pick(here, suite, FULL, 1.0)
    assert full is not None
    axes.axhline(full.exact, color="0.6", lw=1, ls=":", label="full cache")
    mark_budgets(axes, sorted({c.budget for c in here if c.budget < 1}) or [1.0])
    axes.set(xlabel="kept of the KV cache", ylabel=f"exact answers, {suite}", ylim=(-0.02, 1.02))
    axes.legend(fontsize=8)
    axes.set_title(f"{full.num_items} questions; shaded: 95 % interval", fontsize=9)
    return figure


def _points(cells: Sequence[Cell], variant: str, metric: str) -> list[Cell]:
    found = [c for c in cells if c.variant == variant and getattr(c, metric) is not None]
    return sorted(found, key=lambda cell: cell.budget)


def _xy(cells: Sequence[Cell], metric: str) -> tuple[list[float], list[float]]:
    return [c.budget for c in cells], [getattr(c, metric) for c in cells]


def colours() -> Iterator[Any]:
    """Of many curves: tab20's, the strong ones first."""
    from matplotlib import colormaps

    # Without the greys: the full cache is grey.
    shades = list(enumerate(colormaps["tab20"].colors))  # type: ignore[attr-defined]
    return cycle([shade for i, shade in chain(shades[::2], shades[1::2]) if i not in (14, 15)])


def plot(cells: Sequence[Cell], suite: str, path: Path) -> None:
    """Write the curves of one suite; the file's suffix says the format."""
    draw_curves(cells, suite).savefig(path, dpi=130)


def draw_curves(cells: Sequence[Cell], suite: str) -> Figure:
    """A panel for each metric, in it a curve for each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 2).flat
    here = [c for c in cells if c.suite == suite]
    variants = [v for v in names(here, "variant") if v not in LEFT_OUT]
    palette = dict(zip(dict.fromkeys(map(base_name, variants)), colours(), strict=False))
    for axes, (metric, label) in zip(panels, METRICS.items(), strict=True):
        for variant in variants:
            base = base_name(variant)
            colour, dashes = palette[base], "-" if variant == base else "--"
            points = _points(here, variant, metric)
            x, y = _xy(points, metric)
            width = 2.2 if variant in EMPHASISED else 1.1
            axes.plot(x, y, color=colour, ls=dashes, marker="o", ms=3, lw=width, label=variant)
            if metric == "retained" and variant in (PAPER, OURS):
                low, high = [c.retained_low for c in points], [c.retained_high for c in points]
                axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        full = pick(here, suite, FULL, 1.0)
        if full is not None and getattr(full, metric) is not None:
            axes.axhline(getattr(full, metric), color="0.6", lw=1, ls="--", label="full cache")
        mark_budgets(axes, sorted({c.budget for c in here}))
        axes.set(xlabel="kept of the cache", ylabel=label, ylim=(-0.02, 1.02))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=8
    )
    num_items = max((c.num_items for c in here), default=0)
    figure.suptitle(f"{suite}: {num_items} items (shaded: 95 % interval)")
    return figure


def mark_budgets(axes: Any, budgets: Sequence[float]) -> None:
    """A grid, and a logarithmic axis with a tick at each budget, and its text where there is room
    for it."""
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
    axes.grid(alpha=0.25)
