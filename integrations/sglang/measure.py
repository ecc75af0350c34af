"""Post-vision statistics while SGLang prefills: chunks, prefix hits and mixed batches, exactly.

Attention of a query row is over all keys before it, and those lie in the pool when the row's chunk
is computed, whichever chunk or cached prefix they came with. So each chunk measures its own query
rows against the paged cache, and what a prompt's rows say is the sum over its chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from vlcache_triton.backend import Backend
from vlcache_triton.plan import CompressionPlan, make_plan
from vlcache_triton.prompt import Prompt
from vlcache_triton.reference import PostVisionStats

from .prompts import PromptTable, TrackedPrompt


@dataclass(frozen=True)
class Chunk:
    """The query rows of one prompt in this forward.

    first, last: rows of q, the last one not included. seen: keys up to the last query row.
    """

    prompt: TrackedPrompt
    first: int
    last: int
    seen: int


@dataclass(frozen=True)
class Measurement:
    """What a prefill forward measures, the same in every layer.

    chunks: prompts that have query rows in it.
    The tensors are arguments of `post_vision_stats`; the keys are pages of one token.
    """

    chunks: tuple[Chunk, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor
    block_table: Tensor

    def query_rows(self, q: Tensor) -> Tensor:
        """The query rows of q `[num_tokens, num_heads, d]`, packed."""
        return torch.cat([q[chunk.first : chunk.last] for chunk in self.chunks])

    def add_layer(
        self,
        layer: int,
        num_layers: int,
        q: Tensor,
        k_pages: Tensor,
        softmax_scale: float,
        threshold: float,
        backend: Backend,
    ) -> None:
        """Measure one layer and add it to the prompts' sums.

        Args:
            q: `[num_tokens, num_heads, d]` of the whole forward, after RoPE.
            k_pages: `[num_slots, 1, num_kv_heads, d]`, this layer's pool.
        """
        rows = self.query_rows(q)
        width = self.block_table.shape[1]
        stats = backend.post_vision_stats(
            rows,
            k_pages,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            max(chunk.last - chunk.first for chunk in self.chunks),
            width,
            softmax_scale=softmax_scale,
            threshold=threshold,
            seqused_k=self.seqused_k,
            block_table=self.block_table,
        )
        for i, chunk in enumerate(self.chunks):
            if chunk.prompt.sums is None:
                chunk.prompt.sums = _zeros(stats, num_layers, chunk.prompt.length)
            sums, first_key = chunk.prompt.sums, i * width
            seen = stats.scores[:, first_key : first_key + chunk.seen]
            sums.scores[layer, :, : chunk.seen] += seen
            sums.retained[layer] += stats.retained[i]
            sums.visible[layer] += stats.visible[i]


def _zeros(stats: PostVisionStats, num_layers: int, length: int) -> PostVisionStats:
    """Sums of all layers of one prompt, nothing added yet; dtypes and device of `stats`."""
    num_kv_heads, num_heads = stats.scores.shape[0], stats.retained.shape[1]
    return PostVisionStats(
        stats.scores.new_zeros(num_layers, num_kv_heads, length),
        stats.retained.new_zeros(num_layers, num_heads),
        stats.visible.new_zeros(num_layers),
    )


def plan_measurement(
    table: PromptTable,
    rids: Sequence[str],
    prefix_lens: Sequence[int],
    extend_lens: Sequence[int],
    req_to_token: Tensor,
) -> Measurement | None:
    """What to measure in a prefill of these requests; None where there is nothing."""
    chunks, start = [], 0
    for rid, prefix, extend in zip(rids, prefix_lens, extend_lens, strict=True):
        prompt, offset = table.get(rid), start - prefix
        start += extend
        if prompt is None or prompt.is_packed or prefix >= prompt.length:
            continue
        first, seen = max(prompt.first_row, prefix), min(prefix + extend, prompt.length)
        if first < seen:
            chunks.append(Chunk(prompt, first + offset, seen + offset, seen))
    if not chunks:
        return None
    device = req_to_token.device
    width = max(chunk.seen for chunk in chunks)
    rows = torch.tensor([chunk.prompt.req_pool_idx for chunk in chunks], device=device)
    starts_q = [0, *accumulate(chunk.last - chunk.first for chunk in chunks)]
    return Measurement(
        tuple(chunks),
        torch.tensor(starts_q, dtype=torch.int32, device=device),
        torch.arange(len(chunks) + 1, dtype=torch.int32, device=device) * width,
        torch.tensor([chunk.seen for chunk in chunks], dtype=torch.int32, device=device),
        req_to_token[rows, :width].contiguous(),
    )


def ending_prompts(
    table: PromptTable,
    rids: Sequence[str],
    prefix_lens: Sequence[int],
    extend_lens: Sequence[int],
) -> list[TrackedPrompt]:
    """The prompts that no later chunk will attend to as a whole: to be compressed after this one.

    A retracted request's prefill goes on behind its prompt, over the output it had given.
    """
    ending = []
    for rid, prefix, extend in zip(rids, prefix_lens, extend_lens, strict=True):
        prompt = table.get(rid)
        if prompt is not None and not prompt.is_packed and prefix + extend >= prompt.prefilled:
            ending.append(prompt)
    return ending


def plan_prompt(prompt: TrackedPrompt, table: PromptTable, backend: Backend) -> CompressionPlan:
    """What a prompt keeps, from its sums, which are let go of. One host sync."""
    if prompt.sums is None:
        raise RuntimeError(f"prompt {prompt.rid}: got no statistics, expected those of its chunks")
    stats = [PostVisionStats(ψ, r[None], n[None]) for ψ, r, n in zip(*prompt.sums, strict=True)]
    prompt.sums = None
    recipe_prompt = Prompt(prompt.length, (0,), (prompt.query_rows,))
    return make_plan(stats, recipe_prompt, table.config, backend)
