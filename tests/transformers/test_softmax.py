"""Texts that cap their logits softly, as Gemma2, or have sinks, as gpt-oss; in layers with and
without a window."""

from __future__ import annotations

import copy

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
from families import LONG, SHORT, Family, build
from recorded_graph import RecordedGraph, recorded_graphs
from transformers import DynamicCache

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.attention import vlcache_attention
from vlcache_triton.integrations.transformers.names import CACHE
from vlcache_triton.pool.attention import ROWS_AT_ONCE, torch_attention
from vlcache_triton.recipe.softmax import Softmax

TURN = torch.arange(20, 61)[None]  # more than 16 rows
BATCHES = {"one": [LONG], "padded": [LONG, SHORT]}
every_batch = pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)


@pytest.fixture(scope="module", params=["softcap", "sinks"])
def family(request) -> Family:
    if request.param == "softcap":
        return unusual_models.llava_on_gemma2()
    return build("internvl_gpt_oss")


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


def test_the_softmax_and_what_is_evicted_matter_to_this_model(family):
    """Without this, equality would prove nothing."""
    inputs = family.inputs(LONG)
    expected = logits(family.model.generate(**inputs, **GREEDY))
    with vl_cache(family.model, budget=0.4):
        compressed = logits(family.model.generate(**inputs, **GREEDY))
    assert (compressed[:, 1] - expected[:, 1]).abs().max() > 0.01
    plain = copy.deepcopy(family.model)
    for x in plain.modules():
        if hasattr(x, "attn_logit_softcapping"):
            x.attn_logit_softcapping = None
        if hasattr(x, "sinks"):
            x.sinks.data.fill_(-torch.inf)
    assert (logits(plain.generate(**inputs, **GREEDY))[:, 0] - expected[:, 0]).abs().max() > 0.01


SINKS = torch.tensor([1.5, -torch.inf, 9.0, 0.0, -3.0, 4.5])


@pytest.mark.parametrize("n", [3, ROWS_AT_ONCE + 5])
@pytest.mark.parametrize("mask", ["causal", "bool", "added"])
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["no sinks", "sinks"])
def test_blocks_of_rows_are_the_whole(n, mask, sinks):
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
    out = torch_attention(q, k, v, given, Softmax(0.7, 1.5, sinks))
    whole = q @ k.repeat_interleave(3, 1).transpose(2, 3) * 0.7
    whole = torch.tanh(whole / 1.5) * 1.5 + added
    if sinks is not None:
        whole = torch.cat([whole, SINKS[:, None, None].expand(2, -1, n, 1)], -1)
    torch.testing.assert_close(out, whole.softmax(-1)[..., :n_k] @ v.repeat_interleave(3, 1))


@pytest.mark.parametrize(
    "given", [dict(softcap=0.5), dict(s_aux=SINKS[:2])], ids=["softcap", "sinks"]
)
def test_attention_outside_of_any_cache_has_them_too(given):
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    out, _ = vlcache_attention(torch.nn.Module(), q, k, v, None, 1.0, **given)
    softmax = Softmax(1.0, given.get("softcap", 0.0), given.get("s_aux"))
    torch.testing.assert_close(out.transpose(1, 2), torch_attention(q, k, v, None, softmax))
