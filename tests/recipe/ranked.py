"""What the tests of policies share: a prompt that one compresses, and rankings in plain lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from prompts import REFERENCE, Layer, attention, compress, make_layers, make_prompt
from torch import Tensor

from vlcache_triton import VLCacheConfig
from vlcache_triton.pool.compress import PromptCompressor
from vlcache_triton.pool.ragged import RaggedCache
from vlcache_triton.recipe.plan import CompressionPlan
from vlcache_triton.recipe.policies import Policy
from vlcache_triton.recipe.prompt import Prompt, count_query_rows

SHARPNESS = [0.3, 2.0, 8.0, 3.0]
LENGTH, POST_VISION = 60, 12
CONFIG = VLCacheConfig(budget=0.25)
KEEP = 15  # 0.25 * 60
IMAGE = slice(5, LENGTH - POST_VISION)


def run(
    policy: Policy,
    config: VLCacheConfig = CONFIG,
    lengths: Sequence[int] = (LENGTH,),
    rows: Sequence[int] = (POST_VISION,),
    layers: list[Layer] | None = None,
) -> tuple[CompressionPlan, RaggedCache, list[Layer]]:
    """A batch that a policy compresses: image tokens from the sixth to the post-vision rows."""
    prompt = make_prompt(list(lengths), list(rows))
    is_visual = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for row, n, m in zip(is_visual, rows, lengths, strict=True):
        row[len(row) - m + IMAGE.start : len(row) - n] = True
    rows = [
        count_query_rows(n, m, policy.configure(config), policy)
        for n, m in zip(rows, lengths, strict=True)
    ]
    prompt = dataclasses.replace(prompt, query_rows=tuple(rows), is_visual=is_visual)
    layers = layers or make_layers(prompt, SHARPNESS)
    compressor = PromptCompressor(prompt, len(layers), policy.configure(config), REFERENCE, policy)
    return *compress(compressor, layers), layers


def column_sums(layer: Layer, prompt: Prompt) -> Tensor:
    """`[num_kv_heads, length]`: attention summed over the query rows, mean over each group."""
    maps = attention(prompt, layer, 0)
    return maps.sum(1).view(2, -1, maps.shape[-1]).mean(1)


def smoothed(scores: Tensor, width: int) -> list[list[float]]:
    """Each score's mean with its neighbours, `width` in all, fewer at the ends."""
    rows = scores.tolist()
    half = width // 2
    return [
        [
            sum(row[max(0, j - half) : j + half + 1]) / len(row[max(0, j - half) : j + half + 1])
            for j in range(len(row))
        ]
        for row in rows
    ]


def best(row: Sequence[float], count: int, first: int, last: int) -> list[int]:
    """The `count` highest of row[first:last], and everything behind."""
    order = sorted(range(first, last), key=lambda j: (-row[j], j))[:count]
    return sorted(order) + list(range(last, len(row)))


def kept(plan: CompressionPlan, layer: int, head: int) -> list[int]:
    """The positions that a head keeps."""
    return [j for j in plan.kept_positions(layer, 0)[head].tolist() if j >= 0]
