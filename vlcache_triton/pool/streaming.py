"""Compression during prefill: the full cache of all layers never exists at once, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..recipe.budgets import budget_bounds
from ..recipe.plan import (
    CompressionPlan,
    evicted_tokens,
    kept_tokens,
    layer_density,
    layer_scores,
    prompt_budgets,
    recent_tokens,
    select_kept,
)
from ..recipe.softmax import Softmax
from .compress import PromptCompressor, shape_of
from .ragged import RaggedCache

WORTH_PRUNING = 0.75  # a layer is pruned again once its bound is below this share of what it holds


@dataclass
class _Pruned:
    """What one layer still may keep; segments by sequence, then KV head.

    k, v: `[total, 1, d]`; scores `[1, total]`; positions `[total]` int32, within the sequence;
    starts `[num_segments + 1]` int32; keep `[num_seqs]` int64 on the host, tokens; sums
    `[num_segments, 1, d]` fp32 of k and of v, of what is evicted already, where a row is to stand
    for it.
    """

    k: Tensor
    v: Tensor
    scores: Tensor
    positions: Tensor
    starts: Tensor
    keep: Tensor
    sums: tuple[Tensor, Tensor] | None


class StreamingCompressor(PromptCompressor):
    """As PromptCompressor, with the same result, but layers are pruned as soon as they are seen.

    Of a row that stands for what is evicted the sums go along, each token added when it goes; in
    another order than at once, so that it is the same but for rounding.

    After layer j, no layer seen can end up with more than `budget_bounds` says, bounds only shrink
    as layers come, and the Top-K of a smaller budget lies within that of a larger one (the window
    of recent tokens never grows faster than the budget). So what is pruned early would have been
    evicted in the end, and selecting from what is left gives the one-shot selection.

    Cost: a host sync a layer; each layer is moved about log2(num_layers) times more. Memory: the
    bounds of the layers seen, which add up to the final cache, and one dense layer.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._density: list[Tensor] = []
        self._pruned: list[_Pruned] = []

    def add(self, k: Tensor, v: Tensor, q: Tensor, softmax: Softmax) -> None:
        """One layer, after RoPE; arguments as for PromptCompressor."""
        if not self.compresses:
            super().add(k, v, q, softmax)
            return
        self._count(k, v)
        stats = self._measure(k, v, q, softmax).post_vision
        self._density.append(layer_density(stats, self.prompt).cpu())
        bounds = self._bounds()
        for layer, pruned in enumerate(self._pruned):
            if bounds[layer].sum() <= WORTH_PRUNING * pruned.keep.sum():
                self._pruned[layer] = self._prune(pruned, bounds[layer])
        scores = layer_scores(stats, self.prompt, self.config)
        self._pruned.append(self._prune_dense(k, v, scores, bounds[-1]))

    def pack(
        self, head_room: int, allocate: Callable[..., RaggedCache] = RaggedCache
    ) -> tuple[CompressionPlan, RaggedCache]:
        """What to keep, and the cache that keeps it; as PromptCompressor.

        Layer by layer, not by `compact_layers`: that wants layers of one shape and one set of
        starts, which pruned ones do not have, and each is let go of here as soon as it has moved.
        """
        if not self.compresses:
            return super().pack(head_room, allocate)
        density = torch.stack(self._density)
        rows = prompt_budgets(density, self.prompt, self.config)
        keep = kept_tokens(rows, self.prompt, self.config)
        selected = [self._select(x, row) for x, row in zip(self._pruned, keep, strict=True)]
        positions = [
            pruned.positions[_rows(pruned, *chosen)]
            for pruned, chosen in zip(self._pruned, selected, strict=True)
        ]
        num_kv_heads = (len(self._pruned[0].starts) - 1) // len(self.prompt.pads)
        head_keep = rows[..., None].expand(-1, -1, num_kv_heads)
        counts = keep.repeat_interleave(num_kv_heads, 1).reshape(-1).to(density.device)
        cu_kept = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        plan = CompressionPlan(
            self.prompt,
            1.0 - density,
            head_keep,
            torch.cat(positions),
            cu_kept.to(positions[0].device),
            evicted_tokens(head_keep, self.prompt, self.config),
        )
        first = self._pruned[0]
        has_remainder = self.config.remainder != "none"
        shape = shape_of(plan, head_room, first.k, first.v, has_remainder, self.config.is_fp8)
        ragged = allocate(shape, self.backend)
        ragged.lay_out(plan, head_room)
        for layer, (indices, layer_cu_kept) in enumerate(selected):
            pruned = self._pruned.pop(0)
            max_kept = int(keep[layer].max())
            ragged.compact_layer(
                layer, pruned.k, pruned.v, pruned.starts, indices, layer_cu_kept, max_kept
            )
            sums = self._add_evicted(pruned, indices, layer_cu_kept)
            if sums is not None:
                ragged.store_means(layer, *sums)
        return plan, ragged

    def _bounds(self) -> Tensor:
        """`[num_seen, num_seqs]`, of tokens; a sequence that is left whole keeps all."""
        density = torch.stack(self._density).nan_to_num(1.0)
        lengths = torch.tensor(self.prompt.lengths)
        bounds = budget_bounds(density, lengths, self.num_layers, self.config)
        bounds = torch.where(torch.tensor(self.prompt.query_rows) == 0, lengths, bounds)
        return kept_tokens(bounds, self.prompt, self.config)

    def _prune_dense(self, k: Tensor, v: Tensor, scores: Tensor, keep: Tensor) -> _Pruned:
        indices, cu_kept = select_kept(
            scores[None], keep[None], self.prompt, self.config, self.backend
        )
        num_kv_heads, starts = len(scores), self.prompt.starts(k.device)
        segments = starts[:-1].repeat_interleave(num_kv_heads)
        counts = keep.repeat_interleave(num_kv_heads).to(k.device)
        rows = segments.repeat_interleave(counts) + indices
        heads = torch.arange(num_kv_heads, device=k.device).repeat(len(keep))
        kept_scores = scores[heads.repeat_interleave(counts), rows][None]
        sums = None
        if self.config.remainder != "none":
            lengths, longest = self.prompt.seqused(k.device), self.prompt.padded_length
            sums = self.backend.sum_evicted(
                k, v, starts, indices, cu_kept, longest, seqused_k=lengths
            )
        moved = self._move(k, v, starts, indices, cu_kept, keep)
        return _Pruned(*moved, kept_scores, indices, cu_kept, keep, sums)

    def _prune(self, pruned: _Pruned, keep: Tensor) -> _Pruned:
        indices, cu_kept = self._select(pruned, keep)
        rows = _rows(pruned, indices, cu_kept)
        scores, positions = pruned.scores[:, rows], pruned.positions[rows]
        moved = self._move(pruned.k, pruned.v, pruned.starts, indices, cu_kept, keep)
        sums = self._add_evicted(pruned, indices, cu_kept)
        return _Pruned(*moved, scores, positions, cu_kept, keep, sums)

    def _add_evicted(
        self, pruned: _Pruned, indices: Tensor, cu_kept: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """The layer's sums with what it evicts now."""
        if pruned.sums is None:
            return None
        longest = int(pruned.keep.max())
        more = self.backend.sum_evicted(
            pruned.k, pruned.v, pruned.starts, indices, cu_kept, longest
        )
        sum_k, sum_v = (
            torch.cat(pair, 1).sum(1, keepdim=True) for pair in zip(pruned.sums, more, strict=True)
        )
        return sum_k, sum_v

    def _select(self, pruned: _Pruned, keep: Tensor) -> tuple[Tensor, Tensor]:
        """(indices, cu_kept) of `keep` tokens `[num_seqs]`, within the layer's pruned segments."""
        num_kv_heads = (len(pruned.starts) - 1) // len(keep)
        counts = torch.stack([keep, recent_tokens(keep, self.config)])
        counts = counts.repeat_interleave(num_kv_heads, 1).int().to(pruned.starts.device)
        return self.backend.select_tokens(
            pruned.scores,
            pruned.starts,
            counts[0],
            counts[1],
            max_seqlen=int(pruned.keep.max()),
            total_kept=num_kv_heads * int(keep.sum()),
        )

    def _move(
        self, k: Tensor, v: Tensor, starts: Tensor, indices: Tensor, cu_kept: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The rows of k and v that `indices` name, packed."""
        out_k = k.new_empty(len(indices), 1, k.shape[-1])
        out_v = v.new_empty(len(indices), 1, v.shape[-1])
        self.backend.compact_kv(
            k, v, starts, indices, cu_kept, out_k, out_v, cu_kept, max_kept=int(keep.max())
        )
        return out_k, out_v


def _rows(pruned: _Pruned, indices: Tensor, cu_kept: Tensor) -> Tensor:
    """Flat rows of the layer's pruned segments that `indices` name."""
    counts = (cu_kept[1:] - cu_kept[:-1]).long()
    starts = pruned.starts[:-1].long()
    return starts.repeat_interleave(counts, output_size=len(indices)) + indices
