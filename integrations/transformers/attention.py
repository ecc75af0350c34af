"""The attention and mask functions that Transformers calls by the name "vlcache"."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from vlcache_triton.pool.attention import torch_attention
from vlcache_triton.recipe.softmax import Softmax

from .layers import PromptLength, layer_of
from .names import PROMPT_ONLY
from .prefill import prefill_attention

NAME = "vlcache"  # Transformers looks for "flash", "sdpa", "paged|" in such names: avoid them
# What forward passes hand down, or masks say already: attention is the same whatever it says.
SAYS_NOTHING = PROMPT_ONLY | {
    "cache_position",
    "labels",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "sliding_window",
}


def vlcache_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Dense attention, observed where it prefills a VLCache; ragged once that is compressed.

    query `[num_seqs, num_heads, n, d]`, key and value `[num_seqs, num_kv_heads, n_k, d]`, after
    RoPE. s_aux `[num_heads]`: the sinks. Returns `[num_seqs, n, num_heads, d_v]`.

    Raises:
        NotImplementedError: for what a model hands over and this would ignore.
    """
    _check(module, query, s_aux, is_causal, kwargs)
    layer = layer_of(key)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softmax = Softmax(scale, softcap or 0.0, s_aux)
    if layer is not None:
        if attention_mask is not None:
            layer.check_mask(attention_mask)
        decoded = layer.attend(query, key, value, softmax)
        if decoded is not None:
            return decoded, None
    prompt = None if layer is None else layer.prompt
    is_dense = attention_mask is None and dropout == 0 and query.shape[2] == key.shape[2]
    if prompt is not None and is_dense:
        out = prefill_attention(query, key, value, prompt, softmax)
    elif softmax.is_plain:
        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    else:
        out = torch_attention(query, key, value, attention_mask, softmax).transpose(1, 2)
    if prompt is not None:
        layer.observe(query, softmax)
    return out, None


def _check(
    module: nn.Module,
    query: Tensor,
    sinks: Tensor | None,
    is_causal: bool | None,
    others: dict[str, Any],
) -> None:
    """Refuse, by name, what would be ignored: a new keyword of Transformers may mean anything."""
    for name, value in others.items():
        if value is not None and name not in SAYS_NOTHING:
            raise NotImplementedError(
                f"model: got {name!r} in the attention of {type(module).__name__}, expected none:"
                " VL-Cache does not know what it does"
            )
    if is_causal is False:
        raise NotImplementedError("is_causal: got False, expected True: rows see what is before")
    if sinks is None and getattr(module, "sinks", None) is not None:
        raise NotImplementedError(
            f"model: got sinks in {type(module).__name__} that do not reach its attention function,"
            " expected them as its s_aux"
        )
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise NotImplementedError(
            f"s_aux: got shape {tuple(sinks.shape)}, expected ({query.shape[1]},): a logit a head"
        )


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
