"""Curves can be told apart, and their axes be read."""

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from vlcache_triton.apps.evaluation import BUDGETS, plot, plot_first
from vlcache_triton.apps.evaluation.plots import FIRST, METRICS, draw_curves, draw_first
from vlcache_triton.apps.evaluation.summary import Cell

VARIANTS = ["vl_cache", "random", "streaming_llm", "h2o", "snapkv", "pyramidkv", "adakv", "tuned"]
VARIANTS += ["snapkv, tuned", "vl_cache, one set a layer", "attention oracle", "all rows, uniform"]


def cell(variant: str, budget: float) -> Cell:
    shares = dict(exact=0.5, exact_low=0.2, exact_high=0.8, ratio=0.6, num_full=2)
    kept = dict(retained=0.5, retained_low=0.1, retained_high=0.9)
    means = dict(anls=0.5, agreement=0.6, hit_rate=0.7, kv_bytes=1e6)
    return Cell("value", variant, budget, 4, **shares, **kept, **means)


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


def test_the_first_figure_shows_the_paper_the_best_peer_ours_and_random():
    cells = cells_of((0.05, 0.1, 0.4))
    cells += [cell(f"{v}, a row", b) for v in ("vl_cache", "snapkv, tuned") for b in (0.1, 0.4)]
    (axes,) = draw_first(cells).axes
    lines = {line.get_label(): line for line in axes.lines}
    solid = [label for _, label, _ in FIRST]
    dashed = [f"{label}, with our row" for label in (solid[1], solid[2])]
    assert {*lines} == {*solid, *dashed, "full cache"}
    assert [lines[label].get_linestyle() for label in (*solid, *dashed)] == ["-"] * 4 + ["--"] * 2
    assert lines[dashed[0]].get_color() == lines[solid[1]].get_color()
    assert lines[solid[0]].get_xdata().tolist() == [0.05, 0.1, 0.4]
    assert len(axes.collections) == len(solid)  # an interval each
    assert axes.get_xticks().tolist() == [0.05, 0.1, 0.4]


def test_the_first_figure_is_the_same_file_every_time(tmp_path: Path):
    """So that a commit of it changes where numbers did."""
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        plot_first(cells_of(BUDGETS), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_size < 60_000 and b"SnapKV, tuned" in paths[0].read_bytes()


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_plot_is_written(tmp_path: Path, suffix: str, start: bytes):
    path = tmp_path / f"value.{suffix}"
    plot(cells_of(BUDGETS), "value", path)
    assert path.read_bytes().startswith(start)
