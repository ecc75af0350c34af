"""What is measured of a prompt while its layers are read: attention, and what a policy asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.types import KeyValueStats, PostVisionStats
from ..ops import Backend
from .config import VLCacheConfig
from .policies import Policy, PromptStatistics
from .prompt import Prompt
from .softmax import Softmax


class LayerStats(NamedTuple):
    """Of one layer, over the rows that `prompt.cu_seqlens` describes; None is not asked for.

    post_vision: of the query rows.
    guide: `[num_kv_heads, total_k]` fp32, the attention of the guide rows: sum over them, mean over
        the group.
    key_values: of K and V.
    outside: `[num_kv_heads, total_k]` fp32, the policy's own scores.
    """

    post_vision: PostVisionStats
    guide: Tensor | None = None
    key_values: KeyValueStats | None = None
    outside: Tensor | None = None


def measure_layer(
    layer: int,
    k: Tensor,
    v: Tensor,
    q: Tensor,
    softmax: Softmax,
    prompt: Prompt,
    config: VLCacheConfig,
    backend: Backend,
    policy: Policy,
) -> LayerStats:
    """All that the policy asks for of one layer, and nothing else.

    Args:
        layer: its number among those that are compressed.
        k, v: `[num_seqs * padded_length, num_kv_heads, d]` after RoPE.
        q: `[num_seqs, num_heads, n, d]`, whose last rows are the prompts' last rows.

    Raises:
        ValueError: for outside scores of another shape or with NaN, which costs them a host sync.
    """
    attention = partial(_attention, k, q, softmax, backend)
    return measure_attention(attention, layer, k, v, prompt, config, backend, policy)


def measure_attention(
    attention: Callable[..., PostVisionStats],
    layer: int,
    k: Tensor,
    v: Tensor,
    prompt: Prompt,
    config: VLCacheConfig,
    backend: Backend,
    policy: Policy,
) -> LayerStats:
    """As measure_layer, whatever it is that the query rows attend to beside these tokens.

    Args:
        attention: `post_vision_stats` of the rows that a prompt's `query_rows` count, given the
            prompt and options; called last for the prompt itself.
    """
    guide = None
    if policy.guide_rows is not None:
        rows = zip(prompt.query_rows, prompt.lengths, strict=True)
        guide_rows = tuple(min(policy.guide_rows(n, m), n) if n else 0 for n, m in rows)
        guides = dataclasses.replace(prompt, query_rows=guide_rows)
        guide = attention(guides).scores
    post_vision = attention(
        prompt,
        threshold=config.threshold,
        row_weights=_row_weights(guide, prompt, policy, k.device),
        row_reduction=config.row_reduction,
        group_reduction=config.group_reduction,
    )
    key_values = None
    if policy.key_value_stats:
        starts, lengths = prompt.starts(k.device), prompt.seqused(k.device)
        key_values = backend.key_value_stats(k, v, starts, prompt.padded_length, seqused_k=lengths)
    outside = None
    if policy.outside is not None:
        outside = torch.zeros_like(post_vision.scores)
        for span in prompt.spans:
            scores = policy.outside(layer, k[span], v[span])
            outside[:, span] = _checked(scores, outside[:, span])
    return LayerStats(post_vision, guide, key_values, outside)


def prompt_statistics(
    stats: Sequence[LayerStats], attention: Tensor, prompt: Prompt
) -> list[PromptStatistics]:
    """What policies see of each prompt of a batch.

    Args:
        stats: of each layer.
        attention: `[num_layers, num_kv_heads, total_k]`, the scores of the query rows.
    """
    layers = [s._asdict() | (s.key_values._asdict() if s.key_values else {}) for s in stats]
    names = ("guide", "outside", "key_cosine", "value_norm", "mean_key_norm")
    asked = [name for name in names if layers[0].get(name) is not None]
    stacked = {name: torch.stack([layer[name] for layer in layers]) for name in asked}
    norms = stacked.pop("mean_key_norm", None)  # of each prompt, the others of each token
    return [
        PromptStatistics(
            attention[..., span],
            **{name: x[..., span] for name, x in stacked.items()},
            is_visual=is_visual,
            mean_key_norm=None if norms is None else norms[:, i],
        )
        for i, (span, is_visual) in enumerate(zip(prompt.spans, prompt.visual_tokens, strict=True))
    ]


def _attention(
    k: Tensor, q: Tensor, softmax: Softmax, backend: Backend, prompt: Prompt, **options
) -> PostVisionStats:
    cu_seqlens_q, cu_seqlens_k = prompt.cu_seqlens(k.device)
    return backend.post_vision_stats(
        prompt.pack_query_rows(q),
        k,
        cu_seqlens_q,
        cu_seqlens_k,
        max(prompt.query_rows),
        prompt.padded_length,
        **softmax._asdict(),
        **options,
    )


def _row_weights(
    guide: Tensor | None, prompt: Prompt, policy: Policy, device: torch.device
) -> Tensor | None:
    """`[total_q]` fp32 of a batch, where the policy weighs rows."""
    if policy.row_weights is None:
        return None
    weights = []
    for n, span in zip(prompt.query_rows, prompt.spans, strict=True):
        if n:
            own = None if guide is None else guide[:, span.stop - n : span.stop].mean(0)
            weights.append(policy.row_weights(n, own))
    return torch.cat(weights).to(device, torch.float32)


def _checked(scores: Tensor, like: Tensor) -> Tensor:
    got = f"shape {tuple(scores.shape)}"
    if scores.shape == like.shape:
        got = "NaN in it"
        if not bool(scores.isnan().any()):
            return scores
    raise ValueError(
        f"outside: got {got}, expected numbers of shape {tuple(like.shape)} (num_kv_heads, length)"
    )
