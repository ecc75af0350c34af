"""Prefill without masks equals masked eager attention; masks are left out only where they may."""

from __future__ import annotations

import math
import sys
from unittest import mock

import pytest
import torch
from checks import GREEDY, STOCK_ATOL, logits
from families import LONG, SHORT, SUPPORTED
from torch import nn
from transformers.masking_utils import (
    causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from vlcache_triton.integrations.transformers import prefill as prefill_module
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.attention import vlcache_attention, vlcache_mask
from vlcache_triton.integrations.transformers.layers import PromptLength, VLCacheLayer
from vlcache_triton.integrations.transformers.prefill import prefill_attention
from vlcache_triton.recipe.prompt import Prompt
from vlcache_triton.recipe.softmax import Softmax

PADS = {"one": (0,), "even": (0, 0), "padded": (0, 5, 11), "all padded": (3, 1)}
SINKS = torch.tensor([1.5, -math.inf, 6.0, -2.0])  # of two KV heads with two heads each
every_padding = pytest.mark.parametrize("pads", PADS.values(), ids=PADS)


def inputs(pads, num_kv_heads, group, length=12, d=16, d_v=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(heads, size):
        return torch.randn(len(pads), heads, length, size, generator=generator).to(dtype)

    prompt = Prompt(length, tuple(pads), (1,) * len(pads))
    q, k = draw(num_kv_heads * group, d), draw(num_kv_heads, d)
    return q, k, draw(num_kv_heads, d_v), prompt


def eager(q, k, v, prompt, scale, sinks=None):
    """Masked attention `[num_seqs, length, num_heads, d_v]` in fp64, all of it materialised."""
    group, length = q.shape[1] // k.shape[1], prompt.padded_length
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    position = torch.arange(length)
    out = []
    for i, pad in enumerate(prompt.pads):
        hidden = (position > position[:, None]) | (position < pad)
        logits = (q[i].double() @ k[i].mT * scale).masked_fill(hidden, -math.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[:, None, None].expand(-1, length, 1)], -1)
        weights = logits.softmax(-1)[..., :length]
        out.append((weights @ v[i]).transpose(0, 1))
    return torch.stack(out)


def assert_same_rows(out, expected, prompt, atol):
    assert out.shape == expected.shape
    for i, pad in enumerate(prompt.pads):
        torch.testing.assert_close(out[i, pad:].double(), expected[i, pad:], atol=atol, rtol=0)


@every_padding
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_prompts_attend_as_masked_eager_attention_does(pads, num_kv_heads, group):
    q, k, v, prompt = inputs(pads, num_kv_heads, group)
    out = prefill_attention(q, k, v, prompt, Softmax(0.3))
    assert_same_rows(out, eager(q, k, v, prompt, 0.3), prompt, 1e-5)


@every_padding
def test_sinks_take_their_share(pads):
    q, k, v, prompt = inputs(pads, 2, 2)
    out = prefill_attention(q, k, v, prompt, Softmax(0.3, sinks=SINKS))
    assert_same_rows(out, eager(q, k, v, prompt, 0.3, SINKS), prompt, 1e-5)


@every_padding
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 4e-3), (torch.bfloat16, 4e-2)])
def test_half_precision(pads, dtype, atol):
    q, k, v, prompt = inputs(pads, 2, 4, dtype=dtype)
    out = prefill_attention(q, k, v, prompt, Softmax(0.25))
    assert out.dtype == dtype
    assert_same_rows(out, eager(q, k, v, prompt, 0.25), prompt, atol)


def test_the_head_size_of_values_may_differ():
    q, k, v, prompt = inputs((0, 5), 2, 2, d_v=24)
    out = prefill_attention(q, k, v, prompt, Softmax(0.3))
    assert_same_rows(out, eager(q, k, v, prompt, 0.3), prompt, 1e-5)


def test_what_lies_under_pads_reaches_no_row():
    """Not even NaN, and the rows of pads themselves are defined."""
    q, k, v, prompt = inputs((0, 5, 11), 2, 2)
    clean = prefill_attention(q, k, v, prompt, Softmax(0.3))
    for i, pad in enumerate(prompt.pads):
        for x in (q, k, v):
            x[i, :, :pad] = math.nan
    out = prefill_attention(q, k, v, prompt, Softmax(0.3))
    assert torch.equal(out, clean)
    assert out.isfinite().all()


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_flash_attn_is_given_runs_of_pads_as_sequences_of_their_own(monkeypatch, sinks):
    """Its varlen interface, as far as it can be followed without it; it has no sinks."""
    seen = {}

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, **options):
        seen.update(cu_q=cu_q.tolist(), max_q=max_q)
        with_lse = sinks is not None
        assert options == dict(causal=True, softcap=0.0, return_attn_probs=with_lse)
        assert torch.equal(cu_q, cu_k) and max_q == max_k
        out, lse = q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[1::-1])
        for first, last in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            rows = [x[None, first:last].transpose(1, 2) for x in (q, k, v)]
            whole = Prompt(last - first, (0,), (1,))
            out[first:last] = eager(*rows, whole, softmax_scale)[0].to(out.dtype)
            logits = rows[0][0] @ rows[1][0].repeat_interleave(2, 0).mT * softmax_scale
            hidden = torch.ones(last - first, last - first).triu(1) == 1
            lse[:, first:last] = logits.masked_fill(hidden, -math.inf).logsumexp(-1)
        return (out, lse, None) if with_lse else out

    module = mock.Mock(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(prefill_module, "_takes_flash_attn", lambda query, value: True)
    q, k, v, prompt = inputs((0, 5, 11), 2, 2)
    out = prefill_attention(q, k, v, prompt, Softmax(0.3, sinks=sinks))
    assert seen == dict(cu_q=[0, 0, 12, 17, 24, 35, 36], max_q=12)
    assert_same_rows(out, eager(q, k, v, prompt, 0.3, sinks), prompt, 1e-5)


def mask_arguments(pads=(0, 5), length=12, reading=False, **more):
    attention_mask = torch.ones(len(pads), length, dtype=torch.bool)
    for i, pad in enumerate(pads):
        attention_mask[i, :pad] = False
    keys = PromptLength(length) if reading else length
    sizes = dict(batch_size=len(pads), q_length=length, kv_length=keys, q_offset=0, kv_offset=0)
    return sizes | dict(attention_mask=attention_mask, device=torch.device("cpu")) | more


def bidirectional_image(batch_idx, head_idx, q_idx, kv_idx):
    """As Gemma3's: rows 2 to 5 see each other."""
    return (q_idx >= 2) & (q_idx <= 5) & (kv_idx >= 2) & (kv_idx <= 5)


def test_the_causal_prefill_of_a_prompt_needs_no_mask():
    arguments = mask_arguments(reading=True, mask_function=causal_mask_function)
    assert vlcache_mask(**arguments) is None
    assert vlcache_mask(**mask_arguments(reading=True)) is None


@pytest.mark.parametrize("kind", [PromptLength, int], ids=["prefilling", "not prefilling"])
def test_a_compressed_cache_needs_no_mask(kind):
    arguments = mask_arguments() | dict(q_length=1, kv_length=kind(0))
    assert vlcache_mask(**arguments) is None


@pytest.mark.parametrize(
    "mask_function",
    [
        or_masks(causal_mask_function, bidirectional_image),
        sliding_window_causal_mask_function(4),
    ],
    ids=["bidirectional image", "sliding window"],
)
def test_any_other_rule_is_masked(mask_function):
    """While prefilling, too: prefill_attention is causal and nothing else."""
    arguments = mask_arguments(reading=True, mask_function=mask_function)
    mask = vlcache_mask(**arguments)
    assert torch.equal(mask, sdpa_mask(**arguments))
    causal = sdpa_mask(**mask_arguments(mask_function=causal_mask_function))
    assert not torch.equal(mask, causal)


def test_outside_a_prompt_pads_are_masked():
    arguments = mask_arguments(mask_function=causal_mask_function)
    mask = vlcache_mask(**arguments)
    assert torch.equal(mask, sdpa_mask(**arguments))
    assert not mask[1, :, :, :5].any() and mask[1, 0, 11, 5:].all()


def test_without_a_cache_the_attention_is_that_of_sdpa():
    """Vision towers and strangers may call it by name."""
    q, k, v, prompt = inputs((0, 5, 11), 2, 2)
    mask = sdpa_mask(**mask_arguments(prompt.pads, mask_function=causal_mask_function))
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    out, weights = vlcache_attention(module, q, k, v, mask, scaling=0.3)
    assert weights is None
    assert_same_rows(out, eager(q, k, v, prompt, 0.3), prompt, 1e-5)


@pytest.mark.parametrize("family", SUPPORTED, indirect=True)
@pytest.mark.parametrize("budget", [0.4, 1.0])
def test_a_models_prefill_is_that_of_the_stock_model(family, budget):
    """Without a mask, or with one where the family is not plainly causal; pads and all."""
    batch = family.inputs(LONG, SHORT)
    expected = logits(family.model.generate(**batch, **GREEDY))[:, 0]
    taken = []
    watched = mock.patch(
        "vlcache_triton.integrations.transformers.attention.prefill_attention",
        side_effect=lambda *args: taken.append(1) or prefill_attention(*args),
    )
    with watched, vl_cache(family.model, budget=budget) as session:
        out = logits(family.model.generate(**batch, **GREEDY))[:, 0]
        num_full = sum(isinstance(layer, VLCacheLayer) for layer in session.cache.layers)
    torch.testing.assert_close(out, expected, atol=STOCK_ATOL, rtol=0)
    bidirectional = family.name == "gemma3"  # its image rows see each other
    assert len(taken) == (0 if budget == 1.0 or bidirectional else num_full)
