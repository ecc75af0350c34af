"""Each policy against what its paper says, spelled out over small scores and maps."""

import dataclasses
import itertools
import math

import pytest
import torch
from prompts import REFERENCE, compress, make_layers, segment
from ranked import (
    CONFIG,
    KEEP,
    LENGTH,
    POST_VISION,
    SHARPNESS,
    best,
    column_sums,
    run,
    smoothed,
)

from vlcache_triton import VLCacheConfig
from vlcache_triton.pool.compress import PromptCompressor
from vlcache_triton.recipe.policies import (
    POLICIES,
    VL_CACHE,
    Policy,
    adakv,
    adaptive_heads,
    full,
    h2o,
    hindsight,
    pyramidkv,
    random_tokens,
    snapkv,
    streaming_llm,
)
from vlcache_triton.recipe.prompt import read_prompt


def test_streaming_llm_keeps_the_sinks_and_the_most_recent():
    plan, _, _ = run(streaming_llm())
    expected = [*range(4), *range(LENGTH - (KEEP - 4), LENGTH)]
    for layer in range(len(SHARPNESS)):
        assert plan.kept_positions(layer, 0).tolist() == [expected, expected]


def test_h2o_keeps_half_recent_and_half_by_the_attention_of_all_rows():
    plan, _, layers = run(h2o())
    assert plan.prompt.query_rows == (LENGTH,)
    recent = 8  # half of 15, rounded up
    for i, layer in enumerate(layers):
        scores = column_sums(layer, plan.prompt).tolist()
        expected = [best(row, KEEP - recent, 0, LENGTH - recent) for row in scores]
        assert plan.kept_positions(i, 0).tolist() == expected


@pytest.mark.parametrize(("window", "pool"), [(6, 3), (9, 5)])
def test_snapkv_keeps_its_window_and_the_best_of_the_smoothed_scores(window, pool):
    plan, _, layers = run(snapkv(window, pool))
    assert plan.prompt.query_rows == (window,)
    for i, layer in enumerate(layers):
        scores = smoothed(column_sums(layer, plan.prompt), pool)
        expected = [best(row, KEEP - window, 0, LENGTH - window) for row in scores]
        assert plan.kept_positions(i, 0).tolist() == expected


def test_a_window_larger_than_the_budget_keeps_the_latest():
    plan, _, _ = run(snapkv(window=32))
    assert plan.kept_positions(0, 0)[0].tolist() == list(range(LENGTH - KEEP, LENGTH))


def test_pyramidkv_gives_lower_layers_more():
    plan, _, _ = run(pyramidkv(window=4))
    keep = plan.keep[:, 0].tolist()
    assert keep == sorted(keep, reverse=True) and keep[0] > 3 * keep[-1]
    assert sum(keep) == KEEP * len(SHARPNESS)
    ramp = [a - b for a, b in itertools.pairwise(keep)]
    assert max(ramp) - min(ramp) <= 2  # linear but for whole numbers


def test_random_tokens_are_a_sample_that_repeats():
    first, second = run(random_tokens())[0], run(random_tokens())[0]
    assert torch.equal(first.indices, second.indices)
    other = run(random_tokens(seed=1))[0]
    assert not torch.equal(first.indices, other.indices)
    kept = [first.kept_positions(i, 0)[h].tolist() for i in range(4) for h in range(2)]
    assert len(set(map(tuple, kept))) == len(kept)  # a draw of its own for each head
    assert all(len(set(row)) == KEEP for row in kept)


def test_full_is_lossless_at_any_budget():
    assert full().configure(CONFIG).is_lossless
    plan, _, _ = run(full())
    assert plan.keep.tolist() == [[LENGTH]] * len(SHARPNESS)


def test_vl_cache_is_the_plan_without_a_policy():
    assert VL_CACHE.configure(CONFIG) == CONFIG
    plan, _, layers = run(VL_CACHE)
    default, _ = compress(PromptCompressor(plan.prompt, 4, CONFIG, REFERENCE), layers)
    assert torch.equal(plan.indices, default.indices)


def test_hindsight_keeps_what_it_is_told():
    told = torch.rand(4, 2, LENGTH, generator=torch.Generator().manual_seed(3))
    plan, _, _ = run(hindsight(told), VLCacheConfig(budget=0.25, allocation="uniform"))
    for layer in range(4):
        expected = [best(row, KEEP - 1, 0, LENGTH - 1) for row in told[layer].tolist()]
        assert plan.kept_positions(layer, 0).tolist() == expected


def test_hindsight_of_another_prompt_is_refused():
    with pytest.raises(ValueError, match=r"attention: got shape \(4, 2, 7\), expected"):
        run(hindsight(torch.rand(4, 2, 7)))


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.5, 1.0])
def test_adaptive_heads_follow_the_highest_scores(safeguard):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 4, 20, generator=generator) * torch.tensor([1.0, 3, 1, 0.1])[:, None]
    keep = torch.tensor([1, 6, 20])
    counts = adaptive_heads(scores, keep, safeguard)
    assert counts.sum(1).tolist() == (4 * keep).tolist()
    assert counts.max() <= 20
    for layer in range(3):
        k = int(keep[layer])
        certain = math.floor(safeguard * k)
        order = [
            sorted(range(20), key=lambda j, row=row: -row[j]) for row in scores[layer].tolist()
        ]
        taken = [(h, j) for h in range(4) for j in order[h][:certain]]
        rest = [(h, j) for h in range(4) for j in order[h][certain:]]
        rest.sort(key=lambda x, s=scores[layer]: -float(s[x]))
        taken += rest[: 4 * k - len(taken)]
        assert counts[layer].tolist() == [sum(h == i for h, _ in taken) for i in range(4)]


def test_adakv_shares_a_layer_out_over_its_heads():
    plan, ragged, layers = run(adakv(window=4, pool=3))
    assert plan.head_keep.sum(2).tolist() == [[2 * KEEP]] * 4
    assert (plan.head_keep[..., 0] != plan.head_keep[..., 1]).any()
    for i, layer in enumerate(layers):
        scores = smoothed(column_sums(layer, plan.prompt), 3)
        for head, row in enumerate(scores):
            count = int(plan.head_keep[i, 0, head])
            kept = plan.kept_positions(i, 0)[head].tolist()
            assert kept[:count] == best(row, count - 4, 0, LENGTH - 4)
            assert set(kept[count:]) <= {-1}
            k, v = segment(ragged, i, 0, head)
            assert torch.equal(k, layer.k[kept[:count], head])
            assert torch.equal(v, layer.v[kept[:count], head])


@pytest.mark.parametrize("policy", POLICIES, ids=[p.name for p in POLICIES])
def test_a_padded_batch_is_compressed_as_its_prompts_alone(policy):
    plan, ragged, layers = run(policy, lengths=(LENGTH, 37), rows=(POST_VISION, 5))
    for seq, length in enumerate((LENGTH, 37)):
        end = (seq + 1) * LENGTH
        cut = [
            x._replace(k=x.k[end - length : end], v=x.v[end - length : end], q=x.q[seq : seq + 1])
            for x in layers
        ]
        rows = (POST_VISION, 5)[seq]
        alone, single, _ = run(policy, lengths=(length,), rows=(rows,), layers=cut)
        for i in range(len(layers)):
            expected = alone.kept_positions(i, 0)
            assert torch.equal(plan.kept_positions(i, seq)[:, : expected.shape[1]], expected)
            for head in range(2):
                for mine, theirs in zip(
                    segment(ragged, i, seq, head), segment(single, i, 0, head), strict=True
                ):
                    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("policy", POLICIES, ids=[p.name for p in POLICIES])
def test_a_prompt_without_an_image_is_left_whole(policy):
    is_visual = torch.zeros(1, 10, dtype=torch.bool)
    assert read_prompt(is_visual, None, CONFIG, policy).query_rows == (0,)


def test_smoothing_averages_over_neighbours_of_the_same_sequence():
    config = VLCacheConfig(budget=0.25, smoothing=5, recent_fraction=0.0, allocation="uniform")
    plan, _, layers = run(VL_CACHE, config)
    for i, layer in enumerate(layers):
        scores = smoothed(column_sums(layer, plan.prompt), 5)
        expected = [best(row, KEEP - 1, 0, LENGTH - 1) for row in scores]
        assert plan.kept_positions(i, 0).tolist() == expected


@pytest.mark.parametrize("smoothing", [0, 2, -3, True, 1.0])
def test_smoothing_must_be_odd(smoothing):
    with pytest.raises(ValueError, match="smoothing: got"):
        VLCacheConfig(smoothing=smoothing)


def test_the_tuned_preset_leaves_the_default_alone():
    tuned = VLCacheConfig.tuned(budget=0.2)
    assert (tuned.row_reduction, tuned.group_reduction, tuned.remainder) == ("max", "max", "mean")
    assert tuned.granularity == "layer"
    assert tuned.budget == 0.2 and VLCacheConfig.tuned().budget == VLCacheConfig().budget
    assert VLCacheConfig.tuned(smoothing=1, threshold=0.1).smoothing == 1
    default = VLCacheConfig()
    assert (default.max_query_rows, default.smoothing, default.granularity) == (None, 1, "kv_head")


def test_a_policy_weighs_the_query_rows():
    """Each prompt of a batch by its own number of them."""
    asked = []

    def last_three(n, guide):
        assert guide is None
        asked.append(n)
        return (torch.arange(n) >= n - 3).float()

    weighted = Policy("last three", row_weights=last_three)
    fewer = Policy("three", lambda post_vision, length: 3)
    _, _, layers = run(weighted, lengths=(LENGTH, 31), rows=(POST_VISION, 5))
    assert asked == [POST_VISION, 5] * len(SHARPNESS)
    uniform = dataclasses.replace(CONFIG, allocation="uniform")
    plan, _, _ = run(weighted, uniform, (LENGTH, 31), (POST_VISION, 5), layers)
    expected, _, _ = run(fewer, uniform, (LENGTH, 31), (POST_VISION, 5), layers)
    assert torch.equal(plan.indices, expected.indices)


def test_a_policy_is_shown_which_tokens_are_visual():
    """Without pads; None where the prompt does not say."""
    shown = []

    def score(statistics):
        shown.append(statistics.is_visual)
        if statistics.is_visual is None:
            return statistics.attention
        return torch.where(statistics.is_visual, statistics.attention, 0.0)

    is_visual = torch.zeros(2, 20, dtype=torch.bool)
    is_visual[0, 2:9], is_visual[1, 8:14] = True, True
    mask = torch.ones(2, 20)
    mask[1, :5] = 0
    policy = Policy("visual alone", score=score, choices={"recent_fraction": 0.0})
    prompt = read_prompt(is_visual, mask, CONFIG, policy)
    compressor = PromptCompressor(prompt, 4, policy.configure(CONFIG), REFERENCE, policy)
    plan, _ = compress(compressor, make_layers(prompt, SHARPNESS))
    assert [x.tolist() for x in shown] == [is_visual[0].tolist(), is_visual[1, 5:].tolist()]
    for layer in range(4):
        for seq, visual in enumerate(shown):
            for kept in plan.kept_positions(layer, seq).tolist():
                count = min(len(kept) - 1, int(visual.sum()))
                assert int(visual[kept[:-1]].sum()) == count
    shown.clear()
    prompt = dataclasses.replace(prompt, is_visual=None)
    compressor = PromptCompressor(prompt, 4, policy.configure(CONFIG), REFERENCE, policy)
    compress(compressor, make_layers(prompt, SHARPNESS))
    assert shown == [None, None]
