"""streaming=True: the same tokens and the same cache, without all dense layers at once."""

from __future__ import annotations

import copy
import weakref

import oracle
import pytest
import torch
from checks import GREEDY, assert_kept, assert_same_run
from families import LONG, PICTURE, SHORT, SUPPORTED, build
from recorded_graph import RecordedGraph, recorded_graphs

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import VLCache, vl_cache
from vlcache_triton.integrations.transformers.cache import VLCacheLayer
from vlcache_triton.pool.streaming import StreamingCompressor
from vlcache_triton.recipe.policies import snapkv

CHOICES = {
    "usual": dict(budget=0.4),
    "tight": dict(budget=0.1),
    "tokens": dict(budget=7),
    "uniform": dict(budget=0.3, allocation="uniform"),
    "by layer": dict(budget=0.3, granularity="layer"),
    "recent": dict(budget=0.3, recent_fraction=0.6),
    "text": dict(budget=0.3, text_window=4),
    "lossless": dict(budget=1.0),
    "a row for the rest": dict(budget=0.3, remainder="mean"),
    "a row for the rest, tight": dict(budget=0.1, remainder="mean"),
}
SOME = ["llava", "qwen2_5_vl", "gemma3"]


def run(family, inputs, arguments=GREEDY, **choices):
    with vl_cache(family.model, **choices) as session:
        torch.manual_seed(0)
        out = family.model.generate(**inputs, **arguments)
        return out, session.cache


def assert_same_cache(cache, expected):
    assert (cache.plan is None) == (expected.plan is None)
    assert cache.report() == expected.report()
    if expected.plan is None:
        return
    for name in ("head_keep", "indices", "cu_kept"):
        assert torch.equal(getattr(cache.plan, name), getattr(expected.plan, name))
    for name in ("cu_seqlens_k", "seqused_k"):
        assert torch.equal(getattr(cache.ragged, name), getattr(expected.ragged, name))
    live = torch.zeros(len(cache.ragged.k), dtype=torch.bool)
    starts = cache.ragged.cu_seqlens_k[:, :-1].flatten().tolist()
    for start, n in zip(starts, cache.ragged.seqused_k.flatten().tolist(), strict=True):
        live[start : start + n] = True
    if expected.plan.evicted is None:
        assert torch.equal(cache.ragged.k[live], expected.ragged.k[live])
        assert torch.equal(cache.ragged.v[live], expected.ragged.v[live])
    else:  # their sums are added up in another order
        assert torch.equal(cache.plan.evicted, expected.plan.evicted)
        assert torch.equal(cache.ragged.first_key_bias, expected.ragged.first_key_bias)
        torch.testing.assert_close(cache.ragged.k[live], expected.ragged.k[live])
        torch.testing.assert_close(cache.ragged.v[live], expected.ragged.v[live])


@pytest.mark.parametrize("family", SUPPORTED, indirect=True)
def test_every_family(family):
    inputs = family.inputs(LONG, SHORT)
    config = VLCacheConfig(budget=0.4)
    expected, one_shot = run(family, inputs, config=config)
    out, cache = run(family, inputs, config=config, streaming=True)
    assert_same_run(out, expected, 0.0)
    assert_same_cache(cache, one_shot)
    assert_kept(cache, oracle.kept_tokens(family, inputs, config), inputs)


@pytest.mark.parametrize("family", SOME, indirect=True)
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_every_choice(family, choices):
    """In a batch with a prompt that has no image."""
    inputs = family.inputs(LONG, [1, *range(30, 50)], [*SHORT, PICTURE, 7, 8])
    expected, one_shot = run(family, inputs, **choices)
    out, cache = run(family, inputs, **choices, streaming=True)
    assert_same_run(out, expected, 0.0 if "remainder" not in choices else 1e-5)
    assert_same_cache(cache, one_shot)


@pytest.mark.parametrize("family", SOME, indirect=True)
@pytest.mark.parametrize(
    "arguments",
    [
        dict(GREEDY, do_sample=True, temperature=1.3, num_return_sequences=2),
        dict(GREEDY, num_beams=2),
    ],
    ids=["sampled", "beams"],
)
def test_what_generate_can_do(family, arguments):
    inputs = family.inputs(LONG, SHORT)
    expected, _ = run(family, inputs, arguments, budget=0.3)
    out, _ = run(family, inputs, arguments, budget=0.3, streaming=True)
    assert_same_run(out, expected, 0.0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_with_captured_steps_and_the_lean_loop(family, budget):
    inputs = family.inputs(LONG, SHORT)
    expected, _ = run(family, inputs, budget=budget)
    choices = dict(budget=budget, streaming=True, cuda_graph=True)
    with vl_cache(family.model, **choices) as session, recorded_graphs(session):
        out = family.model.generate(**inputs, **GREEDY)
        lean = session.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert RecordedGraph.num_replays >= 12
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(lean, expected.sequences)


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_dense_layers_do_not_coexist(family, monkeypatch):
    """When a layer comes, the dense K and V of those before it are gone."""
    dense, alive, held = [], [], []
    add = StreamingCompressor.add

    def watch(self, k, v, q, *options):
        alive.append([x() is not None for pair in dense for x in pair])
        add(self, k, v, q, *options)
        # Of storages: views of them come and go.
        dense.append([weakref.ref(x.untyped_storage()) for x in (k, v)])
        held.append(sum(x.k.nbytes + x.v.nbytes for x in self._pruned))

    monkeypatch.setattr(StreamingCompressor, "add", watch)
    inputs = family.inputs([1, *range(2, 60), PICTURE, *range(60, 90)])
    _, cache = run(family, inputs, budget=0.1, streaming=True)
    num_layers = len(cache.report().layers)
    assert len(alive) == num_layers and not any(any(row) for row in alive[1:])
    assert held[-1] < cache.report().bytes_before / 2
    for layer in cache.layers:
        assert not isinstance(layer, VLCacheLayer) or layer.keys is None


def test_peak_memory_is_far_below_the_dense_cache(monkeypatch):
    """Eight layers at 10 %: the bytes held between layers, against those of one-shot."""
    family = build("llava", num_hidden_layers=8)
    held = []
    add = StreamingCompressor.add

    def watch(self, *layer):
        add(self, *layer)
        held.append(sum(x.k.nbytes + x.v.nbytes for x in self._pruned))

    monkeypatch.setattr(StreamingCompressor, "add", watch)
    inputs = family.inputs([1, *range(2, 90), *range(2, 90), PICTURE, *range(60, 90)])
    _, cache = run(family, inputs, budget=0.1, streaming=True)
    report = cache.report()
    assert len(held) == 8
    assert report.bytes_after <= held[-1] <= report.bytes_after * 4 // 3 + 8 * 2 * 2 * 16 * 4 * 3
    assert max(held) < 0.45 * report.bytes_before


def test_another_policy_is_refused_by_name(family):
    refused = pytest.raises(NotImplementedError, match=r"^streaming: got True.*'snapkv'")
    with refused:
        VLCache(family.model.config, policy=snapkv(), streaming=True)
    with refused, vl_cache(family.model, policy=snapkv(), streaming=True):
        pytest.fail("the block was entered")


def test_half_precision(family):
    model = copy.deepcopy(family.model).bfloat16()
    inputs = family.inputs(LONG, SHORT)
    inputs = {k: x.bfloat16() if x.is_floating_point() else x for k, x in inputs.items()}
    runs = []
    for streaming in (False, True):
        with vl_cache(model, budget=0.3, streaming=streaming) as session:
            runs.append((model.generate(**inputs, **GREEDY), session.cache))
    assert_same_run(runs[1][0], runs[0][0], 0.0)
    assert_same_cache(runs[1][1], runs[0][1])
