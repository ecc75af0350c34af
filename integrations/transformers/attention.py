"""The attention and mask functions that Transformers calls by the name "vlcache"."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from vlcache_triton.pool.softcap import capped_attention

from .layers import PromptLength, layer_of
from .prefill import prefill_attention

NAME = "vlcache"  # Transformers looks for "flash", "sdpa", "paged|" in such names: avoid them


def vlcache_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Dense attention, observed where it prefills a VLCache; ragged once that is compressed.

    query `[num_seqs, num_heads, n, d]`, key and value `[num_seqs, num_kv_heads, n_k, d]`, after
    RoPE. Returns `[num_seqs, n, num_heads, d_v]`.
    """
    layer = layer_of(key)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = 0.0 if softcap is None else softcap
    for bias in (attention_mask, kwargs.get("position_bias"), kwargs.get("s_aux")):
        if layer is not None and bias is not None:
            layer.check_mask(bias)
    if layer is not None:
        decoded = layer.attend(query, key, value, scale, softcap)
        if decoded is not None:
            return decoded, None
    prompt = None if layer is None else layer.prompt
    is_dense = attention_mask is None and dropout == 0 and query.shape[2] == key.shape[2]
    if prompt is not None and is_dense:
        out = prefill_attention(query, key, value, prompt, scale, softcap)
    elif softcap > 0:  # SDPA would ignore it
        out = capped_attention(query, key, value, attention_mask, scale, softcap).transpose(1, 2)
    else:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if prompt is not None:
        layer.observe(query, scale, softcap)
    return out, None


def vlcache_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    **kwargs,
) -> Tensor | None:
    """SDPA's mask. None for a packed cache, which reports a key length of 0, and for the plain
    causal prefill of a prompt, which prefill_attention does without one."""
    is_causal_prefill = (
        isinstance(kv_length, PromptLength)
        and mask_function is causal_mask_function
        and q_length == kv_length
    )
    if kv_length == 0 or is_causal_prefill:
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        **kwargs,
    )


def register() -> None:
    """Make the name known to Transformers; harmless to repeat."""
    AttentionInterface.register(NAME, vlcache_attention)
    AttentionMaskInterface.register(NAME, vlcache_mask)
