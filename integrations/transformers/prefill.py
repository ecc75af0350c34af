"""Dense attention over a prompt: no materialised mask, no repeated KV heads, pads skipped."""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcache_triton.pool.attention import torch_attention
from vlcache_triton.recipe.prompt import Prompt
from vlcache_triton.recipe.softmax import Softmax


def prefill_attention(
    query: Tensor, key: Tensor, value: Tensor, prompt: Prompt, softmax: Softmax
) -> Tensor:
    """Causal attention within each prompt of a left-padded batch.

    Args:
        query: `[num_seqs, num_heads, padded_length, d]`, after RoPE.
        key, value: `[num_seqs, num_kv_heads, padded_length, d]`.

    Returns:
        `[num_seqs, padded_length, num_heads, d_v]`; the rows of pads are defined, and of no use.
    """
    if _takes_flash_attn(query, value):
        return _flash_attention(query, key, value, prompt, softmax)
    if not any(prompt.pads):
        return _causal(query, key, value, softmax)
    num_seqs, num_heads, length, _ = query.shape
    out = query.new_zeros(num_seqs, length, num_heads, value.shape[-1])
    for i, pad in enumerate(prompt.pads):
        q, k, v = (x[i : i + 1, :, pad:] for x in (query, key, value))
        out[i, pad:] = _causal(q, k, v, softmax)[0]
    return out


def _causal(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
    if not softmax.is_plain:
        return torch_attention(query, key, value, None, softmax).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=softmax.softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, prompt: Prompt, softmax: Softmax
) -> Tensor:
    """flash-attn's varlen kernel: each run of pads is a short sequence of its own. It has no sinks,
    but says what they share a row with."""
    from flash_attn import flash_attn_varlen_func

    num_seqs, num_heads, length, _ = query.shape
    cu_seqlens = prompt.cu_seqlens(query.device)[1]
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    out = flash_attn_varlen_func(
        *(*rows, cu_seqlens, cu_seqlens, length, length),
        softmax_scale=softmax.softmax_scale,
        causal=True,
        softcap=softmax.softcap,
        return_attn_probs=softmax.sinks is not None,  # which come with lse, [num_heads, rows]
    )
    if softmax.sinks is not None:
        out, lse, _ = out
        keys_share = torch.sigmoid(lse - softmax.sinks.float()[:, None])
        out = (out * keys_share.T[..., None]).to(out.dtype)
    return out.view(num_seqs, length, num_heads, -1)


def _takes_flash_attn(query: Tensor, value: Tensor) -> bool:
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and _has_flash_attn()
    )


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None
