"""The pictures show what a plan keeps: shares, light, files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlcache_triton import reference
from vlcache_triton.config import VLCacheConfig
from vlcache_triton.pictures import ImageGrid, draw_report
from vlcache_triton.pictures.draw import kept_share, light
from vlcache_triton.plan import CompressionPlan, make_plan
from vlcache_triton.policies import POLICIES
from vlcache_triton.prompt import Prompt, read_prompt

LENGTH, LAYERS, HEADS = 40, 3, 2


def prompt_of(num_seqs: int) -> Prompt:
    is_visual = torch.zeros(num_seqs, LENGTH, dtype=torch.bool)
    is_visual[:, 4:20] = is_visual[:, 22:26] = True
    return read_prompt(is_visual, None, VLCacheConfig())


def stats_of(num_seqs: int) -> list[reference.PostVisionStats]:
    """Random scores; the first layer is the densest."""
    generator = torch.Generator().manual_seed(0)
    return [
        reference.PostVisionStats(
            torch.rand(HEADS, num_seqs * LENGTH, generator=generator),
            torch.full((num_seqs, 4), 400 - 90 * layer),
            torch.full((num_seqs,), 420),
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


def test_light_falls_where_the_weight_is() -> None:
    """Cell by cell, and ever brighter the more heads keep it."""
    page = torch.ones(4, 6, 3)
    lit = light(page, torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    brightness = lit.mean(-1)
    assert lit.shape == page.shape and ((lit >= 0) & (lit <= 1)).all()
    assert brightness[0, 0] > brightness[0, 2] > brightness[0, 4]
    assert torch.equal(brightness[:2, :2], brightness[:1, :1].expand(2, 2))
    assert torch.equal(lit[3, 5], lit[0, 0]) and torch.equal(lit[3, 0], lit[0, 5])


def draw(folder: Path, grids: list[ImageGrid]) -> list[Path]:
    scores = torch.stack([x.scores for x in stats_of(1)])
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
