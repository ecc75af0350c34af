"""Curves can be told apart, and their axes be read."""

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from vlcache_triton.apps.evaluation import BUDGETS, plot
from vlcache_triton.apps.evaluation.plots import METRICS, draw_curves
from vlcache_triton.apps.evaluation.summary import Cell

VARIANTS = ["vl_cache", "random", "streaming_llm", "h2o", "snapkv", "pyramidkv", "adakv", "tuned"]
VARIANTS += ["hindsight", "all rows, uniform"]


def cell(variant: str, budget: float) -> Cell:
    return Cell("value", variant, budget, 4, 0.5, 0.2, 0.8, 2, 0.5, 0.1, 0.9, 0.5, 0.6, 0.7, 1e6)


def cells_of(budgets) -> list[Cell]:
    return [cell("full", 1.0)] + [cell(v, b) for v in VARIANTS for b in budgets if b < 1]


def test_every_variant_has_a_colour_and_an_interval_has_its_lines():
    figure = draw_curves(cells_of(BUDGETS), "value")
    shown = [variant for variant in VARIANTS if variant != "all rows, uniform"]  # of the ablation
    for axes in figure.axes:
        lines = {line.get_label(): to_rgb(line.get_color()) for line in axes.lines}
        assert set(lines) == {*shown, "full cache"}
        assert len(set(lines.values())) == len(lines)
        intervals = [to_rgb(filled.get_facecolor()[0][:3]) for filled in axes.collections]
        has_intervals = axes.get_ylabel() == METRICS["retained"]
        assert intervals == ([lines["vl_cache"], lines["tuned"]] if has_intervals else [])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*shown, "full cache"]


def test_a_variant_with_a_row_has_its_others_colour_and_dashes():
    cells = [cell(v, b) for v in ("vl_cache", "vl_cache, a row", "tuned") for b in (0.1, 0.2)]
    lines = {line.get_label(): line for line in draw_curves(cells, "value").axes[0].lines}
    with_row, without = lines["vl_cache, a row"], lines["vl_cache"]
    assert with_row.get_color() == without.get_color() != lines["tuned"].get_color()
    assert (with_row.get_linestyle(), without.get_linestyle()) == ("--", "-")


@pytest.mark.parametrize(
    "budgets",
    [BUDGETS, (0.05, 0.1, 0.2, 0.4), (0.1,), (1.0,), (0.001, 0.5, 0.55, 0.6, 0.65, 0.9, 0.95)],
    ids=str,
)
def test_ticks_stand_at_budgets_and_their_texts_apart(budgets):
    figure = draw_curves(cells_of(budgets), "value")
    FigureCanvasAgg(figure).draw()
    measured = sorted({*budgets, 1.0})
    for axes in figure.axes:
        assert axes.get_xticks().tolist() == measured
        assert axes.get_xlim()[0] < measured[0] and axes.get_xlim()[1] > measured[-1]
        written = [text for text in axes.get_xticklabels() if text.get_text()]
        assert written[-1].get_text() == "100%"
        boxes = [text.get_window_extent() for text in written]
        assert all(left.x1 + 2 < right.x0 for left, right in pairwise(boxes))
        for text in written:
            assert float(text.get_text()[:-1]) / 100 in measured


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_plot_is_written(tmp_path: Path, suffix: str, start: bytes):
    path = tmp_path / f"value.{suffix}"
    plot(cells_of(BUDGETS), "value", path)
    assert path.read_bytes().startswith(start)
