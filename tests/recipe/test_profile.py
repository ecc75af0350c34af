"""Budgets by a profile: exact in sum, on the lower hull of every curve, and read as written."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranked import KEEP, LENGTH, run

from vlcache_triton.recipe.policies import VL_CACHE, calibrated, snapkv, sparsemm
from vlcache_triton.recipe.profile import (
    NEGLIGIBLE,
    HeadHits,
    HeadProfile,
    allocate,
    read_profile,
)

LEVELS = [0.01, 0.03, 0.1, 0.3]


def hull(points: list[tuple[int, float]], x: int) -> float:
    """The lower convex hull at x: the least of all chords over it."""
    return min(
        a[1] + (b[1] - a[1]) * (x - a[0]) / max(b[0] - a[0], 1)
        for a in points
        for b in points
        if a[0] <= x <= b[0] and (a[0] < b[0] or a[0] == x)
    )


def points_of(curve: list[float], length: int) -> list[tuple[int, float]]:
    """Corners in tokens, where fewer never lose less, and little is nothing."""
    curve = [*curve, 0.0]
    places = [max(round(level * length), 1) for level in LEVELS] + [length]
    losses = [max(curve[i:]) for i in range(len(curve))]
    return [(x, y if y >= NEGLIGIBLE else 0.0) for x, y in zip(places, losses, strict=True)]


losses = st.sampled_from([-0.1, 0.0, 0.001, 0.009, 0.01]) | st.integers(1, 40).map(lambda x: x / 8)
curves = st.lists(st.lists(losses, min_size=4, max_size=4), min_size=1, max_size=5)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(curves, st.integers(100, 230), st.data())
def test_an_allocation_is_exact_and_the_best_of_its_hulls(curves, length, data) -> None:
    """As good as giving one token after the other to whose hull falls most by it."""
    n = len(curves)
    total = data.draw(st.integers(0, n * length), "total")
    keep = allocate(torch.tensor(curves, dtype=torch.float64), LEVELS, total, length)
    assert keep.dtype == torch.int64 and int(keep.sum()) == total
    assert keep.min() >= 0 and keep.max() <= length
    points = [points_of(curve, length) for curve in curves]
    first = points[0][0][0]
    if total < n * first:
        assert keep.max() - keep.min() <= 1
        return
    values = [[hull(p, x) for x in range(first, length + 1)] for p in points]
    drops = sorted((a - b for v in values for a, b in pairwise(v)), reverse=True)
    least = sum(v[0] for v in values) - sum(drops[: total - n * first])
    got = sum(v[int(k) - first] for v, k in zip(values, keep, strict=True))
    assert got == pytest.approx(least, abs=1e-6)
    if least > 1e-6:  # tokens would still lower a loss
        corners = [{x for x, y in p if abs(hull(p, x) - y) < 1e-9} for p in points]
        off = [int(k) not in c for k, c in zip(keep, corners, strict=True)]
        assert sum(off) <= 1


def test_what_no_loss_asks_for_raises_the_least_first():
    losses = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert allocate(losses, LEVELS, 36, 100).tolist() == [12, 12, 12]
    assert allocate(losses, LEVELS, 14, 100).tolist() == [10, 2, 2]
    assert allocate(losses, LEVELS, 300, 100).tolist() == [100, 100, 100]


def profile_of(num_layers: int = 4, num_kv_heads: int = 2) -> HeadProfile:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(num_layers, num_kv_heads, 4, generator=generator, dtype=torch.float64)
    losses = losses.sort(-1, descending=True).values
    return HeadProfile("a model", "2026-11-26", "pages", "paper", 3, LEVELS, losses.tolist())


def test_a_profile_is_read_as_it_was_written(tmp_path):
    profile = profile_of()
    profile.write(tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == profile
    page = json.loads((tmp_path / "profile.json").read_text())
    assert {"model", "made", "data", "losses", "shares"} <= page.keys()
    for budget, shares in page["shares"].items():
        assert sum(map(sum, shares)) / 8 == pytest.approx(float(budget))


def test_a_calibrated_policy_keeps_what_the_profile_says(tmp_path):
    """With the ranking of any policy, over heads of all layers."""
    profile = profile_of()
    profile.write(tmp_path / "profile.json")
    expected = profile.heads(KEEP * 8, LENGTH, 2)
    assert expected.sum(1).unique().numel() > 1
    for policy in (VL_CACHE, snapkv(window=2)):
        ours = calibrated(tmp_path / "profile.json", policy)
        assert ours.made_for == "a model" and ours.name == f"{policy.name}, calibrated"
        assert ours.score == policy.score
        assert torch.equal(run(ours)[0].head_keep[:, 0], expected)


@pytest.mark.parametrize("shape", [(3, 2), (4, 1)])
def test_a_profile_of_other_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"^profile: got one of"):
        run(calibrated(profile_of(*shape)))


def test_layers_alone_share_exactly():
    for profile in (profile_of(), HeadHits([[1.0, 2], [0, 0], [5, 1], [0, 3]], window=2)):
        keep = profile.layers(KEEP * 4, LENGTH)
        assert keep.shape == (4,) and int(keep.sum()) == KEEP * 4
        assert keep.unique().numel() > 1 and keep.max() <= LENGTH


def test_sparsemm_files_are_read(tmp_path):
    """As their repository has them: the hits of each sample by "layer-head"."""
    hits = {f"{i}-{j}": [0.1 * i, 0.3 * j, 0.2] for i in range(4) for j in range(4)}
    (tmp_path / "qwen.json").write_text(json.dumps(hits))
    found = read_profile(tmp_path / "qwen.json")
    assert isinstance(found, HeadHits)
    expected = torch.tensor([[sum(hits[f"{i}-{j}"]) / 3 for j in range(4)] for i in range(4)])
    torch.testing.assert_close(torch.tensor(found.hits), expected)
    plan = run(sparsemm(tmp_path / "qwen.json", window=4))[0]
    same = run(calibrated(replace(found, window=4), snapkv(window=4)))[0]
    assert torch.equal(plan.head_keep, same.head_keep)
    assert calibrated(found).made_for is None


PAGES = {
    "no JSON": "{",
    "a list": "[1]",
    "nothing": "{}",
    "another key": '{"layer 0": [1]}',
    "no hits": '{"0-0": []}',
    "a hole": '{"0-0": [1], "1-1": [1]}',
    "below 0": '{"0-0": [-1]}',
    "all 0": '{"0-0": [0], "0-1": [0]}',
    "words": '{"0-0": ["many"]}',
}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_what_is_no_profile_is_refused(tmp_path, page):
    (tmp_path / "a.json").write_text(page)
    with pytest.raises(ValueError, match=r"^profile: 'a\.json' (holds|is|has)"):
        read_profile(tmp_path / "a.json")


@pytest.mark.parametrize(
    "change", [dict(losses=None), dict(losses=[[[1.0]]]), dict(levels=[0.3, 0.1, 0.03, 0.01])]
)
def test_a_profile_that_is_none_is_refused(tmp_path, change):
    page = profile_of().to_dict() | change
    (tmp_path / "a.json").write_text(json.dumps(page))
    with pytest.raises(ValueError, match=r"^profile: 'a\.json' has losses"):
        read_profile(tmp_path / "a.json")
    del page["losses"]
    (tmp_path / "a.json").write_text(json.dumps(page))
    with pytest.raises(ValueError, match=r"^profile: 'a\.json' has no \['losses'\]"):
        read_profile(tmp_path / "a.json")


def test_a_profile_is_no_file_of_hits(tmp_path):
    profile_of().write(tmp_path / "profile.json")
    with pytest.raises(ValueError, match="hits: got a profile of a model"):
        sparsemm(tmp_path / "profile.json")
