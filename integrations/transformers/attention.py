"""The attention and mask functions that Transformers calls by the name "vlcache"."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "vlcache"  # Transformers looks for "flash", "sdpa", "paged|" in such names: avoid them


def vlcache_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """SDPA over a dense cache, observed where it prefills a VLCache; ragged once compressed.

    query `[num_seqs, num_heads, n, d]`, key and value `[num_seqs, num_kv_heads, n_k, d]`, after
    RoPE. Returns `[num_seqs, n, num_heads, d_v]`.
    """
    layer = getattr(key, "vlcache_layer", None)  # set by VLCacheLayer.update, a line before
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layer is not None and (decoded := layer.attend(query, scale)) is not None:
        return decoded, None
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    if layer is not None:
        layer.observe(query, scale)
    return out, None


def vlcache_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    **kwargs,
) -> Tensor | None:
    """SDPA's mask; none for a compressed cache, which reports a key length of 0."""
    if kv_length == 0:
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        **kwargs,
    )


def register() -> None:
    """Make the name known to Transformers; harmless to repeat."""
    AttentionInterface.register(NAME, vlcache_attention)
    AttentionMaskInterface.register(NAME, vlcache_mask)
