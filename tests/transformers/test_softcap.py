"""A text that caps its logits softly, as Gemma2, in layers with and without a window."""

from __future__ import annotations

import oracle
import pytest
import torch
import unusual_models
from checks import (
    GREEDY,
    ORACLE_ATOL,
    STOCK_ATOL,
    assert_compressed_run,
    assert_kept,
    assert_same_run,
    logits,
)
from families import LONG, SHORT, Family
from recorded_graph import RecordedGraph, recorded_graphs
from transformers import DynamicCache

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.attention import vlcache_attention
from vlcache_triton.integrations.transformers.names import CACHE
from vlcache_triton.pool.softcap import ROWS_AT_ONCE, capped_attention

TURN = torch.arange(20, 61)[None]  # more than 16 rows
BATCHES = {"one": [LONG], "padded": [LONG, SHORT]}
every_batch = pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)


@pytest.fixture(scope="module")
def family() -> Family:
    return unusual_models.llava_on_gemma2()


@every_batch
def test_a_full_budget_is_the_stock_model(family, prompts):
    inputs = family.inputs(*prompts)
    expected = family.model.generate(**inputs, **GREEDY)
    with vl_cache(family.model, budget=1.0):
        out = family.model.generate(**inputs, **GREEDY)
    assert_same_run(out, expected, STOCK_ATOL)


@every_batch
@pytest.mark.parametrize("streaming", [False, True])
def test_a_compressed_run_equals_the_masked_full_cache(family, prompts, streaming):
    inputs, config = family.inputs(*prompts), VLCacheConfig(budget=0.4, remainder="mean")
    with vl_cache(family.model, config, streaming=streaming) as session:
        out = family.model.generate(**inputs, **GREEDY)
    assert session.report().layers == [1, 3]
    assert_compressed_run(family, inputs, config, session, out)


def test_so_does_one_on_the_triton_kernels(family):
    inputs, config = family.inputs(LONG), VLCacheConfig(budget=0.4)
    with vl_cache(family.model, config, backend="triton") as session:
        out = family.model.generate(**inputs, **dict(GREEDY, max_new_tokens=2))
    assert_compressed_run(family, inputs, config, session, out)


@torch.no_grad()
def test_a_long_turn_equals_the_masked_full_cache(family):
    inputs, config = family.inputs(LONG, SHORT), VLCacheConfig(budget=0.4)
    turn = TURN.expand(2, -1)

    def run(cache):
        family.model(**inputs, **{CACHE: cache})
        return family.model(input_ids=turn, **{CACHE: cache}).logits

    kept = oracle.kept_tokens(family, inputs, config)
    with oracle.evicted(family, kept):
        expected = run(DynamicCache(config=family.model.config))
    with vl_cache(family.model, config) as session:
        cache = session.new_cache(max_new_tokens=64)
        out = run(cache)
    assert_kept(cache, kept, inputs)
    torch.testing.assert_close(out, expected, atol=ORACLE_ATOL, rtol=0)


def test_captured_steps(family):
    """Layers with a window are rings then."""
    inputs = family.inputs(LONG, SHORT)
    with vl_cache(family.model, budget=0.4):
        expected = family.model.generate(**inputs, **GREEDY)
    captured = vl_cache(family.model, budget=0.4, cuda_graph=True)
    with captured as session, recorded_graphs(session):
        RecordedGraph.num_replays = 0
        out = family.model.generate(**inputs, **GREEDY)
        assert RecordedGraph.num_replays > 0
    assert_same_run(out, expected, ORACLE_ATOL)


def test_the_cap_and_what_is_evicted_matter_to_this_model(family):
    """Without this, equality would prove nothing."""
    inputs = family.inputs(LONG)
    expected = logits(family.model.generate(**inputs, **GREEDY))
    with vl_cache(family.model, budget=0.4):
        compressed = logits(family.model.generate(**inputs, **GREEDY))
    assert (compressed[:, 1] - expected[:, 1]).abs().max() > 0.01
    attentions = [x for x in family.model.modules() if hasattr(x, "attn_logit_softcapping")]
    try:
        for x in attentions:
            x.attn_logit_softcapping = None
        uncapped = logits(family.model.generate(**inputs, **GREEDY))
    finally:
        for x in attentions:
            x.attn_logit_softcapping = family.text_config.attn_logit_softcapping
    assert (uncapped[:, 0] - expected[:, 0]).abs().max() > 0.01


@pytest.mark.parametrize("n", [3, ROWS_AT_ONCE + 5])
@pytest.mark.parametrize("mask", ["causal", "bool", "added"])
def test_blocks_of_rows_are_the_whole(n, mask):
    generator = torch.Generator().manual_seed(0)
    n_k = n + 7
    q, k, v = (
        torch.randn(2, heads, rows, 8, generator=generator)
        for heads, rows in ((6, n), (2, n_k), (2, n_k))
    )
    seen = torch.ones(n, n_k, dtype=torch.bool).tril(n_k - n)
    added = torch.zeros(n, n_k).masked_fill(~seen, -torch.inf)
    if mask == "added":
        added[:, 0] += 1.5
    given = {"causal": None, "bool": seen.expand(2, 1, -1, -1), "added": added[None, None]}[mask]
    out = capped_attention(q, k, v, given, 0.7, 1.5)
    whole = q @ k.repeat_interleave(3, 1).transpose(2, 3) * 0.7
    whole = torch.tanh(whole / 1.5) * 1.5 + added
    torch.testing.assert_close(out, whole.softmax(-1) @ v.repeat_interleave(3, 1))


def test_attention_outside_of_any_cache_is_capped_too():
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    out, _ = vlcache_attention(torch.nn.Module(), q, k, v, None, 1.0, softcap=0.5)
    torch.testing.assert_close(out.transpose(1, 2), capped_attention(q, k, v, None, 1.0, 0.5))
