"""From statistics to what is kept, held to entry-by-entry loops over the attention maps."""

import dataclasses
import math

import pytest
import torch
from prompts import CPU, REFERENCE, attention, make_layers, make_prompt, sparsity, top_positions

from vlcache_triton import VLCacheConfig, layer_budgets
from vlcache_triton.recipe.plan import make_plan, recent_tokens, whole_plan
from vlcache_triton.recipe.policies import VL_CACHE
from vlcache_triton.recipe.prompt import Prompt
from vlcache_triton.recipe.statistics import measure_layer

SHARPNESS = [0.3, 2.0, 8.0]  # dense, middling and sparse layers


def plan_of(prompt, layers, config):
    stats = [
        measure_layer(i, *layer, prompt, config, REFERENCE, VL_CACHE)
        for i, layer in enumerate(layers)
    ]
    return make_plan(stats, prompt, config, REFERENCE)


def alone(layers, prompt, seq):
    """One sequence of the batch, as a batch of its own."""
    single = Prompt(prompt.lengths[seq], (0,), (prompt.query_rows[seq],))
    start, end = seq * prompt.padded_length + prompt.pads[seq], (seq + 1) * prompt.padded_length
    cut = [
        layer._replace(
            k=layer.k[start:end],
            v=layer.v[start:end],
            q=layer.q[seq : seq + 1, :, prompt.pads[seq] :],
        )
        for layer in layers
    ]
    return single, cut


@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
@pytest.mark.parametrize("recent_fraction", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("budget", [0.05, 0.4, 12])
def test_the_plan_is_the_recipe(budget, recent_fraction, granularity):
    prompt = make_prompt([50, 31], [9, 4])
    layers = make_layers(prompt, SHARPNESS)
    config = VLCacheConfig(budget=budget, recent_fraction=recent_fraction, granularity=granularity)
    plan = plan_of(prompt, layers, config)
    for seq, length in enumerate(prompt.lengths):
        maps = [attention(prompt, layer, seq) for layer in layers]
        gamma = torch.tensor([[sparsity(x, config.threshold)] for x in maps], dtype=torch.float64)
        torch.testing.assert_close(plan.sparsity[:, seq : seq + 1], gamma)
        keep = layer_budgets(1 - gamma, torch.tensor([length]), config)
        assert torch.equal(plan.keep[:, seq : seq + 1], keep)
        for row, layer_maps in enumerate(maps):
            expected = top_positions(layer_maps, int(keep[row]), 2, config)
            assert plan.kept_positions(row, seq).tolist() == expected


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.5, 0.9, 2, 7])
def test_the_total_is_exact(budget):
    prompt = make_prompt([40, 23, 7], [5, 5, 2])
    config = VLCacheConfig(budget=budget, min_layer_budget=0.0)
    plan = plan_of(prompt, make_layers(prompt, SHARPNESS), config)
    for seq, length in enumerate(prompt.lengths):
        wanted = 3 * budget if isinstance(budget, int) else round(budget * 3 * length)
        assert plan.keep[:, seq].sum() == max(wanted, 3)  # a token a layer at least
    assert plan.keep.min() >= 1
    assert plan.cu_kept[-1] == len(plan.indices) == 2 * int(plan.keep.sum())


def test_the_parts_of_a_plan_fit_each_other():
    prompt = make_prompt([40, 23], [5, 5])
    plan = plan_of(prompt, make_layers(prompt, SHARPNESS), VLCacheConfig(budget=0.3))
    assert plan.indices.dtype == plan.cu_kept.dtype == torch.int32
    assert plan.keep.dtype == torch.int64 and plan.sparsity.dtype == torch.float64
    counts = plan.cu_kept.diff().view(3, 2, 2)
    assert torch.equal(counts, plan.keep[..., None].expand(-1, -1, 2).int())
    for layer in range(3):
        cu_kept = plan.layer_cu_kept(layer)
        assert cu_kept.shape == (5,) and cu_kept[0] == plan.cu_kept[layer * 4]
        for seq in range(2):
            positions = plan.kept_positions(layer, seq)
            start = cu_kept[seq * 2]
            flat = plan.indices[start : start + positions.numel()]
            assert torch.equal(positions.flatten(), flat)
            assert (positions.diff() > 0).all()
            assert positions.min() >= 0
            assert (positions[:, -1] == prompt.lengths[seq] - 1).all()  # the last prompt token


def test_the_heads_of_a_layer_choose_for_themselves():
    prompt = make_prompt([60], [8])
    layers = make_layers(prompt, SHARPNESS)
    by_head = plan_of(prompt, layers, VLCacheConfig(budget=0.3))
    by_layer = plan_of(prompt, layers, VLCacheConfig(budget=0.3, granularity="layer"))
    assert torch.equal(by_head.keep, by_layer.keep)
    for layer in range(3):
        one, other = by_head.kept_positions(layer, 0)
        assert not torch.equal(one, other)
        one, other = by_layer.kept_positions(layer, 0)
        assert torch.equal(one, other)


@pytest.mark.parametrize("query_rows", [[8, 3, 5], [8, 0, 5]], ids=["all", "one left whole"])
def test_a_padded_batch_equals_its_sequences(query_rows):
    prompt = make_prompt([60, 17, 33], query_rows)
    layers = make_layers(prompt, SHARPNESS)
    # What lies under pads must not matter.
    for seq, pad in enumerate(prompt.pads):
        start = seq * prompt.padded_length
        for layer in layers:
            layer.k[start : start + pad] = 1e4
    config = VLCacheConfig(budget=0.25)
    together = plan_of(prompt, layers, config)
    for seq in range(3):
        if query_rows[seq] == 0:
            continue
        single = plan_of(*alone(layers, prompt, seq), config)
        assert torch.equal(together.keep[:, seq : seq + 1], single.keep)
        torch.testing.assert_close(together.sparsity[:, seq : seq + 1], single.sparsity)
        for layer in range(3):
            expected = single.kept_positions(layer, 0)
            assert torch.equal(together.kept_positions(layer, seq), expected)


def test_a_sequence_without_post_vision_rows_is_left_whole():
    prompt = make_prompt([20, 30], [0, 4])
    plan = plan_of(prompt, make_layers(prompt, SHARPNESS), VLCacheConfig(budget=0.2))
    assert plan.keep[:, 0].tolist() == [20] * 3
    assert plan.keep[:, 1].sum() == round(0.2 * 3 * 30)
    assert plan.sparsity[:, 0].isnan().all() and not plan.sparsity[:, 1].isnan().any()
    for layer in range(3):
        assert plan.kept_positions(layer, 0).tolist() == [list(range(20))] * 2


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.9, 2, 7])
def test_a_row_for_the_rest_is_paid_from_the_budget(budget):
    prompt = make_prompt([40, 23, 7], [5, 5, 2])
    layers = make_layers(prompt, SHARPNESS)
    config = VLCacheConfig(budget=budget, min_layer_budget=0.0)
    without = plan_of(prompt, layers, config)
    plan = plan_of(prompt, layers, dataclasses.replace(config, remainder="mean"))
    assert without.evicted is None
    assert torch.equal(plan.head_keep, without.head_keep)
    lengths = torch.tensor(prompt.lengths)[:, None]
    has_row = (plan.head_keep > 1) & (plan.head_keep < lengths)
    assert torch.equal(plan.head_tokens, plan.head_keep - has_row.long())
    assert torch.equal(plan.evicted, torch.where(has_row, lengths - plan.head_tokens, 0))
    assert plan.cu_kept[-1] == len(plan.indices) == plan.head_tokens.sum()
    for layer in range(3):
        for seq in range(3):
            fewer, more = (x.kept_positions(layer, seq).tolist() for x in (plan, without))
            for few, many in zip(fewer, more, strict=True):
                assert set(few) <= set(many) and few[-1] == prompt.lengths[seq] - 1


def test_ties_go_to_the_lower_position():
    prompt = make_prompt([30], [1])
    plan = plan_of(prompt, make_layers(prompt, [0.0]), VLCacheConfig(budget=0.2))
    assert plan.kept_positions(0, 0).tolist() == [[0, 1, 2, 3, 4, 29]] * 2


@pytest.mark.parametrize(
    ("fraction", "keep", "expected"),
    [
        (0.1, [1, 4, 10, 14, 15, 100], [1, 1, 1, 1, 2, 10]),
        (0.0, [1, 50, 7, 2, 3, 4], [1, 1, 1, 1, 1, 1]),
        (1.0, [1, 50, 7, 2, 3, 4], [1, 50, 7, 2, 3, 4]),
        (0.5, [1, 2, 3, 4, 5, 6], [1, 1, 2, 2, 3, 3]),
        (0.1, [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    ],
)
def test_recent_tokens_round_half_up_and_are_one_at_least(fraction, keep, expected):
    config = VLCacheConfig(recent_fraction=fraction)
    assert recent_tokens(torch.tensor(keep), config).tolist() == expected


def test_a_whole_plan_keeps_everything():
    prompt = make_prompt([5, 3], [2, 0])
    plan = whole_plan(prompt, 3, 2, CPU)
    assert plan.keep.tolist() == [[5, 3]] * 3
    assert all(math.isnan(x) for x in plan.sparsity.flatten().tolist())
    assert plan.sparsity.shape == (3, 2)
    assert plan.indices.dtype == plan.cu_kept.dtype == torch.int32
    assert plan.cu_kept.diff().tolist() == [5, 5, 3, 3] * 3
    for layer in range(3):
        assert plan.layer_cu_kept(layer).diff().tolist() == [5, 5, 3, 3]
        for seq, length in enumerate([5, 3]):
            assert plan.kept_positions(layer, seq).tolist() == [list(range(length))] * 2
