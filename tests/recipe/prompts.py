"""Inputs that the recipe's tests share: batches of prompts, and layers that see them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vlcache_triton import VLCacheConfig
from vlcache_triton.ops import Backend, get_backend
from vlcache_triton.pool.compress import PromptCompressor
from vlcache_triton.pool.ragged import RaggedCache
from vlcache_triton.recipe.plan import CompressionPlan
from vlcache_triton.recipe.prompt import Prompt
from vlcache_triton.recipe.softmax import Softmax

CPU = torch.device("cpu")
REFERENCE: Backend = get_backend("reference", CPU)


class Layer(NamedTuple):
    """Arguments of `PromptCompressor.add`: k, v `[rows, num_kv_heads, d]`, q `[B, H, n, d]`."""

    k: Tensor
    v: Tensor
    q: Tensor
    softmax: Softmax


def make_prompt(lengths: list[int], query_rows: list[int]) -> Prompt:
    """A left-padded batch of prompts of these lengths."""
    width = max(lengths)
    return Prompt(width, tuple(width - n for n in lengths), tuple(query_rows))


def make_layers(
    prompt: Prompt,
    sharpness: list[float],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    d: int = 8,
    d_v: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Layer]:
    """A layer for each sharpness of attention: 0 attends to all alike, 20 to very few."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    num_seqs, length = len(prompt.pads), prompt.padded_length
    layers = []
    for factor in sharpness:
        k = draw(num_seqs * length, num_kv_heads, d)
        v = draw(num_seqs * length, num_kv_heads, d_v)
        q = draw(num_seqs, num_heads, length, d) * factor
        layers.append(Layer(k.to(dtype), v.to(dtype), q.to(dtype), Softmax(d**-0.5)))
    return layers


def compress(
    compressor: PromptCompressor, layers: list[Layer], head_room: int = 4
) -> tuple[CompressionPlan, RaggedCache]:
    """Add all layers, and pack."""
    for layer in layers:
        compressor.add(*layer)
    return compressor.pack(head_room)


def attention(prompt: Prompt, layer: Layer, seq: int) -> Tensor:
    """`[num_heads, τ, m]` fp64: the post-vision rows of one sequence, pads left out."""
    rows, length = prompt.query_rows[seq], prompt.lengths[seq]
    start = seq * prompt.padded_length + prompt.pads[seq]
    k = layer.k[start : start + length].double()  # [m, num_kv_heads, d]
    q = layer.q[seq, :, layer.q.shape[2] - rows :].double()  # [num_heads, τ, d]
    k = k.repeat_interleave(q.shape[0] // k.shape[1], 1)
    logits = torch.einsum("hqd,khd->hqk", q, k) * layer.softmax.softmax_scale
    hidden = torch.arange(length) > torch.arange(length - rows, length)[:, None]
    return logits.masked_fill(hidden, -math.inf).softmax(-1)


def sparsity(maps: Tensor, threshold: float) -> float:
    """γ' (equations 1 and 2) of `attention`'s maps, the mean over heads, entry by entry."""
    rows, length = maps.shape[1:]
    zeroed = visible = 0
    for head in maps:
        for i, row in enumerate(head):
            seen = row[: length - rows + i + 1]
            visible += len(seen)
            zeroed += int((seen < threshold * seen.max()).sum())
    return zeroed / visible


def top_positions(
    maps: Tensor, keep: int, num_kv_heads: int, config: VLCacheConfig
) -> list[list[int]]:
    """Recipe steps 4 and 5 by sorting: the kept positions of each KV head."""
    length = maps.shape[-1]
    scores = maps.sum(1) if config.row_reduction == "sum" else maps.amax(1)
    scores = scores.view(num_kv_heads, -1, length)
    scores = scores.mean(1) if config.group_reduction == "mean" else scores.amax(1)
    if config.granularity == "layer":
        scores = scores.mean(0, keepdim=True).expand(num_kv_heads, -1)
    recent = min(keep, max(1, math.floor(config.recent_fraction * keep + 0.5)))
    older = range(length - recent)
    chosen = []
    for head in scores.tolist():
        best = sorted(older, key=lambda j: (-head[j], j))[: keep - recent]
        chosen.append([*sorted(best), *range(length - recent, length)])
    return chosen


def segment(ragged: RaggedCache, layer: int, seq: int, head: int) -> tuple[Tensor, Tensor]:
    """Live rows `[n, d]` and `[n, d_v]` of one KV head of a sequence."""
    s = seq * ragged.num_kv_heads + head
    start, count = int(ragged.cu_seqlens_k[layer, s]), int(ragged.seqused_k[layer, s])
    return ragged.k[start : start + count, 0], ragged.v[start : start + count, 0]
