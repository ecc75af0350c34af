"""Streaming gives what one-shot compression gives, exactly, and holds no more than it says."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prompts import REFERENCE, Layer, compress, make_layers, make_prompt, segment

from vlcache_triton import VLCacheConfig
from vlcache_triton.pool.compress import PromptCompressor
from vlcache_triton.pool.streaming import WORTH_PRUNING, StreamingCompressor
from vlcache_triton.recipe.budgets import budget_bounds
from vlcache_triton.recipe.policies import VL_CACHE
from vlcache_triton.recipe.statistics import measure_layer


class Watched(StreamingCompressor):
    """Counts how often layers seen earlier are pruned again, and the tokens held after each."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_pruned_again, self.held = 0, []

    def add(self, *layer):
        super().add(*layer)
        self.held.append(sum(int(x.keep.sum()) for x in self._pruned))
        for pruned in self._pruned:  # the rows themselves, not a view into a dense layer
            rows = int(pruned.keep.sum()) * (len(pruned.starts) - 1) // len(pruned.keep)
            for pool in (pruned.k, pruned.v):
                assert len(pool) == rows
                assert pool.untyped_storage().nbytes() == pool.nbytes

    def _prune(self, *args):
        self.num_pruned_again += 1
        return super()._prune(*args)


def assert_same(streamed, expected):
    (plan, ragged), (other, dense) = streamed, expected
    for name in ("sparsity", "head_keep", "indices", "cu_kept"):
        torch.testing.assert_close(
            getattr(plan, name), getattr(other, name), rtol=0, atol=0, equal_nan=True
        )
    assert (plan.evicted is None) == (other.evicted is None)
    if plan.evicted is not None:
        assert torch.equal(plan.evicted, other.evicted)
        assert torch.equal(ragged.first_key_bias, dense.first_key_bias)
    for name in ("cu_seqlens_k", "seqused_k"):
        assert torch.equal(getattr(ragged, name), getattr(dense, name))
    assert (ragged.room, ragged.max_seqlen_k) == (dense.room, dense.max_seqlen_k)
    num_layers, num_seqs, num_kv_heads = plan.head_keep.shape
    for layer in range(num_layers):
        for seq in range(num_seqs):
            for head in range(num_kv_heads):
                k, v = segment(ragged, layer, seq, head)
                expected_k, expected_v = segment(dense, layer, seq, head)
                if plan.evicted is not None and plan.evicted[layer, seq, head]:
                    # Its sums are added up in another order.
                    torch.testing.assert_close((k[0], v[0]), (expected_k[0], expected_v[0]))
                    k, v, expected_k, expected_v = (x[1:] for x in (k, v, expected_k, expected_v))
                assert torch.equal(k, expected_k) and torch.equal(v, expected_v)


def with_ties(layers: list[Layer]) -> list[Layer]:
    """Three different keys alone, so that many scores are equal."""
    keys = [layer.k[..., :1].round().clamp(-1, 1).expand_as(layer.k) for layer in layers]
    return [layer._replace(k=k.contiguous()) for layer, k in zip(layers, keys, strict=True)]


@st.composite
def problems(draw):
    num_seqs = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 60), min_size=num_seqs, max_size=num_seqs))
    query_rows = [draw(st.integers(0, n)) for n in lengths]
    # Sparse layers behind dense ones make late bounds tighter, and the other way round.
    sharpness = draw(st.lists(st.sampled_from([0, 0.3, 2.0, 20.0]), min_size=1, max_size=10))
    prompt = make_prompt(lengths, query_rows)
    seed = draw(st.integers(0, 2**31))
    layers = make_layers(prompt, sharpness, d=4, d_v=2, seed=seed)
    if draw(st.booleans()):
        layers = with_ties(layers)
    config = VLCacheConfig(
        budget=draw(st.one_of(st.floats(0.02, 0.9), st.integers(2, 70))),
        recent_fraction=draw(st.sampled_from([0.0, 0.1, 0.37, 0.9, 1.0])),
        min_layer_budget=draw(st.sampled_from([0.0, 0.01, 0.2])),
        max_layer_budget=draw(st.sampled_from([0.5, 1.0])),
        granularity=draw(st.sampled_from(["kv_head", "layer"])),
        allocation=draw(st.sampled_from(["sparsity", "sparsity", "uniform", "pyramid"])),
        clipping=draw(st.sampled_from(["exact", "exact", "paper"])),
        smoothing=draw(st.sampled_from([1, 1, 5])),
        remainder=draw(st.sampled_from(["none", "mean"])),
    )
    return prompt, layers, config


def example_problem(**choices):
    """Twelve layers, dense first: each is pruned again as sparse ones follow."""
    prompt = make_prompt([60, 41], [9, 5])
    sharpness = [0.3, 20.0, 2.0, 20.0, 0.3, 20.0, 20.0, 0.3, 2.0, 0.0, 20.0, 0.3]
    return prompt, make_layers(prompt, sharpness), VLCacheConfig(**choices)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(problems())
@example(example_problem(budget=0.05))
@example(example_problem(budget=0.3, recent_fraction=1.0))
@example(example_problem(budget=6, granularity="layer"))
@example(example_problem(budget=0.05, remainder="mean"))
@example(example_problem(budget=2, remainder="mean"))
def test_streaming_gives_the_one_shot_result(problem):
    prompt, layers, config = problem
    arguments = (prompt, len(layers), config, REFERENCE)
    expected = compress(PromptCompressor(*arguments), layers)
    assert_same(compress(StreamingCompressor(*arguments), layers), expected)


@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
@pytest.mark.parametrize("recent_fraction", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("budget", [0.06, 0.1, 0.4, 3])
def test_layers_are_pruned_again_and_again(budget, recent_fraction, granularity):
    prompt, layers, config = example_problem(
        budget=budget, recent_fraction=recent_fraction, granularity=granularity
    )
    compressor = Watched(prompt, len(layers), config, REFERENCE)
    streamed = compress(compressor, layers)
    assert compressor.num_pruned_again >= 6
    expected = compress(PromptCompressor(prompt, len(layers), config, REFERENCE), layers)
    assert_same(streamed, expected)


def test_ties_are_many_and_do_not_matter():
    prompt, layers, config = example_problem(budget=0.1)
    layers = with_ties(layers)
    stats = measure_layer(0, *layers[0], prompt, config, REFERENCE, VL_CACHE)
    scores = stats.post_vision.scores
    assert len(scores[0].unique()) < 0.4 * scores.shape[1]
    compressor = Watched(prompt, 12, config, REFERENCE)
    streamed = compress(compressor, layers)
    assert compressor.num_pruned_again >= 12
    assert_same(streamed, compress(PromptCompressor(prompt, 12, config, REFERENCE), layers))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
@example(example_problem(budget=0.05))
@example(example_problem(budget=0.4))
def test_no_more_is_held_than_the_bounds_of_the_layers_seen(problem):
    """A layer is moved only where that frees a quarter of it, so up to a third more is held."""
    prompt, layers, config = problem
    if not prompt.is_compressible:
        return
    compressor = Watched(prompt, len(layers), config, REFERENCE)
    plan, _ = compress(compressor, layers)
    density = (1 - plan.sparsity).nan_to_num(1.0)
    lengths = torch.tensor(prompt.lengths)
    left_whole = torch.tensor(prompt.query_rows) == 0
    for num_seen, held in enumerate(compressor.held, start=1):
        bounds = budget_bounds(density[:num_seen], lengths, len(layers), config)
        bounds = torch.where(left_whole, lengths, bounds)
        assert held <= bounds.sum() / WORTH_PRUNING


def test_far_less_than_the_dense_cache_is_held():
    """At 10 %, and the bounds of all layers add up to the final cache but for rounding."""
    prompt = make_prompt([400], [20])
    generator = torch.Generator().manual_seed(0)
    sharpness = (torch.rand(32, generator=generator) * 4).tolist()
    layers = make_layers(prompt, sharpness, num_heads=2, num_kv_heads=1)
    config = VLCacheConfig(budget=0.1)
    compressor = Watched(prompt, 32, config, REFERENCE)
    plan, _ = compress(compressor, layers)
    assert max(compressor.held) < 0.4 * 32 * 400
    assert compressor.held[-1] <= (int(plan.keep.sum()) + 2 * 32) / WORTH_PRUNING


def test_each_layer_is_moved_about_log2_times():
    prompt = make_prompt([400], [20])
    layers = make_layers(prompt, [1.0] * 32, num_heads=2, num_kv_heads=1)
    compressor = Watched(prompt, 32, VLCacheConfig(budget=0.1), REFERENCE)
    compress(compressor, layers)
    # Bounds fall about as 1 / layers seen, and a layer moves at each fall by a quarter.
    assert 32 <= compressor.num_pruned_again <= 32 * 8
