"""The pictures show what a plan keeps: shares, colours, files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from vlcache_triton.apps.pictures import ImageGrid, draw_report
from vlcache_triton.apps.pictures.draw import (
    LUMINANCE,
    MAX_SIDE,
    OPACITY,
    TINT,
    _count_scale,
    _pixels,
    blend,
    kept_share,
)
from vlcache_triton.kernels import reference
from vlcache_triton.recipe.config import VLCacheConfig
from vlcache_triton.recipe.plan import CompressionPlan, make_plan
from vlcache_triton.recipe.policies import POLICIES
from vlcache_triton.recipe.prompt import Prompt, read_prompt
from vlcache_triton.recipe.statistics import LayerStats

LENGTH, LAYERS, HEADS = 40, 3, 2


def prompt_of(num_seqs: int) -> Prompt:
    is_visual = torch.zeros(num_seqs, LENGTH, dtype=torch.bool)
    is_visual[:, 4:20] = is_visual[:, 22:26] = True
    return read_prompt(is_visual, None, VLCacheConfig())


def stats_of(num_seqs: int) -> list[LayerStats]:
    """Random scores; the first layer is the densest."""
    generator = torch.Generator().manual_seed(0)
    return [
        LayerStats(
            reference.PostVisionStats(
                torch.rand(HEADS, num_seqs * LENGTH, generator=generator),
                torch.full((num_seqs, 4), 400 - 90 * layer),
                torch.full((num_seqs,), 420),
            )
        )
        for layer in range(LAYERS)
    ]


def plan_of(num_seqs: int = 1, policy: str = "vl_cache", budget: float = 0.3) -> CompressionPlan:
    chosen = {p.name: p for p in POLICIES}[policy]
    config = chosen.configure(VLCacheConfig(budget=budget))
    return make_plan(stats_of(num_seqs), prompt_of(num_seqs), config, reference, chosen)


@pytest.mark.parametrize(("policy", "budget"), [("vl_cache", 0.3), ("adakv", 0.9)])
def test_kept_share_is_that_of_heads(policy: str, budget: float) -> None:
    """Counted by hand, with heads that keep as many and with heads that do not."""
    plan = plan_of(policy=policy, budget=budget)
    share = kept_share(plan)
    assert share.shape == (LAYERS, LENGTH)
    expected = torch.zeros(LAYERS, LENGTH)
    bounds = plan.cu_kept.tolist()
    for segment, (start, end) in enumerate(pairwise(bounds)):
        for position in plan.indices[start:end].tolist():
            expected[segment // HEADS, position] += 1 / HEADS
    torch.testing.assert_close(share, expected)
    assert 0 < share.mean() < 1 and (share == 0.5).any()


def test_several_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^plan: got 2 sequences"):
        kept_share(plan_of(num_seqs=2))


PAGES = {
    "light": torch.ones(8, 12, 3),
    "dark": torch.zeros(8, 12, 3),
    "photograph": torch.rand(8, 12, 3, generator=torch.Generator().manual_seed(1)),
}
WEIGHTS = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.25, 1.0]])


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_colour_says_how_much_is_kept_on_any_page(page: Tensor) -> None:
    """Cell by cell; a page's own colours and brightness have no part in it."""
    blended = blend(page, WEIGHTS)
    assert blended.shape == page.shape and ((blended >= 0) & (blended <= 1)).all()
    chroma = blended.amax(-1) - blended.amin(-1)
    expected = OPACITY * WEIGHTS.repeat_interleave(4, 0).repeat_interleave(4, 1)
    torch.testing.assert_close(chroma, expected, atol=1e-6, rtol=0)
    kept = blended[expected == OPACITY]
    assert (kept[:, 0] > kept[:, 1]).all() and (kept[:, 1] > kept[:, 2]).all()  # orange


def test_what_is_not_kept_is_the_page_in_grey() -> None:
    """So that empty paper does not look kept, be it white or black."""
    page = torch.cat([PAGES["light"][:, :4], PAGES["dark"][:, :4], PAGES["photograph"][:, :4]], 1)
    blended = blend(page, torch.zeros(2, 3))
    assert torch.allclose(blended, (page @ LUMINANCE)[..., None].expand_as(page))
    assert torch.allclose(blended[:, :4], torch.ones(())) and not blended[:, 4:8].any()


def luminance(colour: Tensor) -> Tensor:
    """Relative luminance of sRGB colours `[..., 3]` (WCAG 2)."""
    linear = torch.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return linear @ LUMINANCE


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_text_is_readable_under_any_colour(weight: float) -> None:
    """Black on white and white on black: 4.5, what WCAG asks for running text."""
    weights = torch.full((1, 1), weight)
    white = luminance(blend(torch.ones(1, 1, 3), weights))
    black = luminance(blend(torch.zeros(1, 1, 3), weights))
    assert (white + 0.05) / (black + 0.05) >= 4.5


@pytest.mark.parametrize("num_heads", [1, 2, 3, 16, 224])
def test_the_scale_counts_heads(num_heads: int) -> None:
    scale = _count_scale(num_heads, "of all")
    assert min(scale.ticks) == 0 and max(scale.ticks) == 1
    for weight, text in scale.ticks.items():
        assert weight * num_heads == pytest.approx(int(text))


def num_pixels(path: Path, colour: Tensor) -> int:
    """Of a colour, but for rounding to bytes."""
    with Image.open(path) as picture:
        return int(((_pixels(picture) - colour).abs() < 0.01).all(-1).sum())


def test_pictures_have_their_scale_and_the_page_its_colours(tmp_path: Path) -> None:
    """On a white page the tint on black stands in the scale alone; the page's cells are as large
    as one another, whatever is kept of them."""
    positions = torch.arange(4, 20).view(4, 4)
    _, kept, layers, scores = draw(tmp_path, [ImageGrid(positions, torch.ones(64, 64, 3))])
    for path in (kept, layers, scores):
        assert num_pixels(path, OPACITY * TINT) > 10, f"{path.name}: no scale"
    share = kept_share(plan_of())[:, positions]
    weights = torch.tensor([[0.5, 1.0]])
    half, full = blend(torch.ones(1, 2, 3), weights)[0]
    a_cell = num_pixels(layers, full) / int((share == 1).sum())
    assert a_cell > 100
    assert num_pixels(layers, half) / int((share == 0.5).sum()) == pytest.approx(a_cell, rel=0.1)


def test_a_photograph_is_drawn_no_larger_than_can_be_seen() -> None:
    shown = _pixels(Image.new("RGB", (3 * MAX_SIDE, MAX_SIDE), (255, 0, 51)))
    assert shown.shape == (round(MAX_SIDE / 3), MAX_SIDE, 3)
    torch.testing.assert_close(shown[5, 7], torch.tensor([1.0, 0.0, 0.2]))
    assert _pixels(Image.new("L", (30, 20))).shape == (20, 30, 3)


def draw(folder: Path, grids: list[ImageGrid]) -> list[Path]:
    scores = torch.stack([x.post_vision.scores for x in stats_of(1)])
    images = [Image.new("RGB", (30, 20), "white"), Image.new("RGB", (40, 10), "red")]
    return draw_report(folder, images, grids, plan_of(), scores, [0, 2, 5])


def test_a_page_of_pictures_for_each_image(tmp_path: Path) -> None:
    """Valid PNGs, in a folder that is made; images of several shapes."""
    grids = [
        ImageGrid(torch.arange(4, 20).view(4, 4), torch.rand(16, 16, 3)),
        ImageGrid(torch.arange(22, 26).view(1, 4), None),
    ]
    paths = draw(tmp_path / "new" / "report", grids)
    names = ["budgets.png"]
    names += [f"{kind}-{i}.png" for i in (1, 2) for kind in ("kept", "layers", "scores")]
    assert [path.name for path in paths] == names
    sizes = {}
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            picture.load()
            sizes[path.name] = picture.size
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10, "a picture of nothing"
    assert sizes["layers-1.png"][0] > sizes["kept-1.png"][0]  # three small ones side by side
    assert sizes["kept-1.png"][1] > sizes["kept-2.png"][1]  # its image is the taller


def test_without_grids_the_budgets_alone(tmp_path: Path) -> None:
    assert [path.name for path in draw(tmp_path, [])] == ["budgets.png"]
