"""The figures of the page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Any

from ..evaluation.plots import colours, mark_budgets
from ..evaluation.summary import names
from ..evaluation.variants import FULL, OURS, PAPER
from .scores import Score
from .variants import ABLATED

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _panels(number: int, width: float = 5.0) -> tuple[Figure, list[Any]]:
    """Side by side, with grids."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * number, 4), layout="constrained")
    panels = list(figure.subplots(1, number, squeeze=False)[0])
    for axes in panels:
        axes.grid(alpha=0.25)
    return figure, panels


def accuracy(scores: Sequence[Score]) -> Figure:
    """A panel for each task, a curve for each variant."""
    tasks = names(scores, "task")
    variants = [variant for variant in names(scores, "variant") if variant != FULL]
    palette = dict(zip(variants, colours(), strict=False))
    figure, panels = _panels(len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        here = sorted((s for s in scores if s.task == task), key=lambda s: s.budget)
        for variant in variants:
            found = [s for s in here if s.variant == variant]
            width = 2.2 if variant in (PAPER, OURS) else 1.1
            x, y = [s.budget for s in found], [s.value for s in found]
            axes.plot(x, y, marker="o", ms=3, lw=width, color=palette[variant], label=variant)
        full = next(s for s in here if s.variant == FULL)
        axes.axhline(full.value, color="0.6", ls=":", label="full cache")
        mark_budgets(axes, sorted({s.budget for s in here if s.variant != FULL}) or [1.0])
        axes.set(title=task, xlabel="kept of the KV cache", ylabel=full.metric)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def ablation(scores: Sequence[Score]) -> Figure:
    """A panel for each choice, a line of its values for each task; at the smallest budget."""
    tasks = names(scores, "task")
    budget = min(s.budget for s in scores if s.variant != FULL)
    figure, panels = _panels(len(ABLATED), 3.2)
    for axes, (name, values) in zip(panels, ABLATED.items(), strict=True):
        for task, colour in zip(tasks, colours(), strict=False):
            by_name = {s.variant: s.value for s in scores if (s.task, s.budget) == (task, budget)}
            found = [(str(x), by_name[f"{name}={x}"]) for x in values if f"{name}={x}" in by_name]
            if found:
                axes.plot(*zip(*found, strict=True), marker="o", color=colour, label=task)
        axes.set(title=name)
    panels[0].set(ylabel=f"score at {100 * budget:.3g} %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def sparsity(found: dict[str, list[list[float]]]) -> Figure:
    """γ' by layer, with its standard deviation over prompts."""
    figure, (axes,) = _panels(1, 7)
    for (phase, prompts), colour in zip(found.items(), ("C0", "C3"), strict=False):
        layers = list(zip(*prompts, strict=True))
        if layers:
            y, spread = [mean(x) for x in layers], [pstdev(x) for x in layers]
            x = list(range(len(layers)))
            axes.plot(x, y, marker="o", ms=3, color=colour, label=phase)
            low, high = zip(*((m - s, m + s) for m, s in zip(y, spread, strict=True)), strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(xlabel="layer", ylabel="sparsity γ'")
    axes.legend()
    return figure


def latency(rows: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each batch: ms a token by length, a line for each loop and budget."""
    batches = sorted({row["batch"] for row in rows})
    kinds = list(dict.fromkeys((row["loop"], row["budget"]) for row in rows))
    figure, panels = _panels(len(batches))
    for axes, batch in zip(panels, batches, strict=True):
        for (loop, budget), colour in zip(kinds, colours(), strict=False):
            line = (batch, loop, budget)
            here = [r for r in rows if (r["batch"], r["loop"], r["budget"]) == line]
            points = sorted((r["length"], r["token_ms"]) for r in here)
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                color=colour,
                label=f"{loop}, {100 * budget:.3g} %",
            )
        axes.set(title=f"batch {batch}", xlabel="prompt tokens", ylabel="ms a token", xscale="log")
        axes.set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
