"""Post-vision statistics while SGLang prefills: chunks, prefix hits and mixed batches, exactly.

Attention of a query row is over all keys before it, and those lie in the pool when the row's chunk
is computed, whichever chunk or cached prefix they came with. So each chunk measures its own query
rows against the paged cache, and what a prompt's rows say is the sum over its chunks (or, where a
token's score is a maximum over rows, the maximum over them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vlcache_triton.kernels.launch import to_device
from vlcache_triton.ops import Backend
from vlcache_triton.recipe.config import VLCacheConfig
from vlcache_triton.recipe.plan import CompressionPlan, plan_from_scores, prompt_budgets
from vlcache_triton.recipe.profile import HeadHits, HeadProfile
from vlcache_triton.recipe.prompt import Prompt

from .prompts import ChunkStats, PromptTable, TrackedPrompt
from .ranks import Ranks

#: A request of a prefill: its id, the tokens that are in the cache, and those that are read now.
Span = tuple[str, int, int]


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
        """The query rows of q `[num_tokens, num_heads, d]`, packed; one prompt's are a view."""
        rows = [q[chunk.first : chunk.last] for chunk in self.chunks]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def add_layer(
        self,
        layer: int,
        num_layers: int,
        q: Tensor,
        k_pages: Tensor,
        softmax_scale: float,
        config: VLCacheConfig,
        backend: Backend,
    ) -> None:
        """Measure one layer and add it to what chunks before said. No sync, no copy from the host.

        Args:
            q: `[num_tokens, num_heads, d]` of the whole forward, after RoPE.
            k_pages: `[num_slots, 1, num_kv_heads, d]`, this layer's pool.
        """
        width = self.block_table.shape[1]
        stats = backend.post_vision_stats(
            self.query_rows(q),
            k_pages,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            max(chunk.last - chunk.first for chunk in self.chunks),
            width,
            softmax_scale=softmax_scale,
            threshold=config.threshold,
            seqused_k=self.seqused_k,
            block_table=self.block_table,
            row_reduction=config.row_reduction,
            group_reduction=config.group_reduction,
        )
        for i, chunk in enumerate(self.chunks):
            if chunk.prompt.stats is None:
                num_kv_heads, num_heads = stats.scores.shape[0], stats.retained.shape[1]
                chunk.prompt.stats = ChunkStats(
                    stats.scores.new_zeros(num_layers, num_kv_heads, chunk.prompt.length),
                    stats.retained.new_zeros(num_layers, num_heads),
                )
            ours, first_key = chunk.prompt.stats, i * width
            scores = ours.scores[layer, :, : chunk.seen]
            seen = stats.scores[:, first_key : first_key + chunk.seen]
            if config.row_reduction == "sum":
                scores += seen
            else:  # and over the heads of a group: settings.py refuses one without the other
                torch.maximum(scores, seen, out=scores)
            ours.retained[layer] += stats.retained[i]


def plan_measurement(
    table: PromptTable, spans: Sequence[Span], req_to_token: Tensor
) -> Measurement | None:
    """What to measure in a prefill of these requests; None where there is nothing."""
    chunks, start = [], 0
    for rid, prefix, extend in spans:
        prompt, offset = table.get(rid), start - prefix
        start += extend
        if prompt is None or prompt.is_packed or prefix >= prompt.length:
            continue
        first, seen = max(prompt.first_row, prefix), min(prefix + extend, prompt.length)
        if first < seen:
            chunks.append(Chunk(prompt, first + offset, seen + offset, seen))
    if not chunks:
        return None
    width = max(chunk.seen for chunk in chunks)
    count = len(chunks)
    facts = torch.zeros(4, triton.cdiv(count + 1, 4) * 4, dtype=torch.int32)  # rows of 16 bytes
    facts[0, :count] = torch.tensor([chunk.prompt.req_pool_idx for chunk in chunks])
    facts[1, :count] = torch.tensor([chunk.seen for chunk in chunks])
    facts[2, 1 : count + 1] = torch.tensor([c.last - c.first for c in chunks]).cumsum(0)
    facts[3, : count + 1] = torch.arange(count + 1) * width
    rows, seqused_k, cu_seqlens_q, cu_seqlens_k = to_device(facts, req_to_token.device)
    return Measurement(
        tuple(chunks),
        cu_seqlens_q=cu_seqlens_q[: count + 1],
        cu_seqlens_k=cu_seqlens_k[: count + 1],
        seqused_k=seqused_k[:count],
        block_table=req_to_token[rows[:count], :width].contiguous(),
    )


def ending_prompts(table: PromptTable, spans: Sequence[Span]) -> list[TrackedPrompt]:
    """The prompts that no later chunk will attend to as a whole: to be compressed after this one.

    A retracted request's prefill goes on behind its prompt, over the output it had given.
    """
    ending = []
    for rid, prefix, extend in spans:
        prompt = table.get(rid)
        if prompt is not None and not prompt.is_packed and prefix + extend >= prompt.prefilled:
            ending.append(prompt)
    return ending


def plan_prompts(
    prompts: Sequence[TrackedPrompt],
    config: VLCacheConfig,
    ranks: Ranks,
    backend: Backend,
    profile: HeadProfile | HeadHits | None = None,
) -> CompressionPlan:
    """What prompts that end together keep, from what their chunks said, which is let go of. One
    host sync.

    They are one left-padded batch to the recipe, each one's scores behind its pads. Layers share
    the budget by the profile, where there is one.
    """
    lengths = [prompt.length for prompt in prompts]
    longest = max(lengths)
    batch = Prompt(
        longest,
        tuple(longest - length for length in lengths),
        tuple(prompt.query_rows for prompt in prompts),
    )
    stats = [_taken(prompt) for prompt in prompts]
    padded = [
        F.pad(s.scores, (longest - n, 0)) if n < longest else s.scores
        for s, n in zip(stats, lengths, strict=True)
    ]
    scores = padded[0] if len(padded) == 1 else torch.cat(padded, -1)
    retained = torch.stack([s.retained for s in stats], 1)  # [num_layers, num_seqs, num_heads]
    scores = ranks.layer_scores(scores, batch, config)
    retained, num_heads = ranks.retained(retained)
    visible = torch.tensor([prompt.visible for prompt in prompts], dtype=torch.float64)
    density = retained.cpu().double() / num_heads / visible  # the sync
    keep = None
    if profile is not None:
        totals = prompt_budgets(density, batch, config).sum(0).tolist()
        of = [profile.layers(*x) for x in zip(totals, lengths, strict=True)]
        keep = torch.stack(of, 1)
    return plan_from_scores(scores, density, batch, config, backend, keep)


def _taken(prompt: TrackedPrompt) -> ChunkStats:
    stats, prompt.stats = prompt.stats, None
    if stats is None:
        raise RuntimeError(f"prompt {prompt.rid}: got no statistics, expected those of its chunks")
    return stats
