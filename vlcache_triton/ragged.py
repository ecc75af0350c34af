"""One layer's compressed cache: every (sequence, KV head) a varlen segment with head room."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend

MAX_DECODE_ROWS = 16  # query rows that varlen_decode takes at once
ROWS_AT_ONCE = 256  # of a long turn; bounds its attention mask
GROWTH = 128  # rows that a full segment grows by, at least


class RaggedKV:
    """K and V pools `[capacity, 1, d]` that flash-attn's varlen interface can read as they are.

    k, v: the pools; rows of a segment behind its live length are undefined.
    cu_seqlens_k: `[num_segments + 1]` int32, segment starts, head room included.
    seqused_k: `[num_segments]` int32, live lengths; each append advances them on the device.
    capacities: rows of each segment, head room included, on the host.
    room: rows that every segment can still take.

    Segments are ordered by sequence, then KV head. Memory: (kept + head room) rows.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        seqused_k: Tensor,
        capacities: Sequence[int],
        *,
        room: int,
        num_kv_heads: int,
        backend: Backend,
    ) -> None:
        self.k, self.v, self.seqused_k = k, v, seqused_k
        self.capacities, self.room, self.num_kv_heads = list(capacities), room, num_kv_heads
        self.cu_seqlens_k = _starts(self.capacities, k.device)
        self.backend = backend

    @classmethod
    def compact(
        cls,
        k: Tensor,
        v: Tensor,
        starts: Tensor,
        indices: Tensor,
        cu_kept: Tensor,
        kept: Sequence[int],
        *,
        room: int,
        backend: Backend,
    ) -> RaggedKV:
        """Move the kept rows of k and v `[total_k, num_kv_heads, d]` into fresh pools.

        Args:
            starts: `[num_seqs + 1]` int32, each sequence's first real row in k and v.
            indices, cu_kept: this layer's part of a plan.
            kept: tokens kept of each segment, on the host.
            room: head room of each segment, in rows.
        """
        num_kv_heads = k.shape[1]
        capacities = [n + room for n in kept]
        total = sum(capacities)
        out = cls(
            k.new_empty(total, 1, k.shape[-1]),
            v.new_empty(total, 1, v.shape[-1]),
            cu_kept[1:] - cu_kept[:-1],
            capacities,
            room=room,
            num_kv_heads=num_kv_heads,
            backend=backend,
        )
        backend.compact_kv(
            k,
            v,
            starts,
            indices,
            cu_kept,
            out.k,
            out.v,
            out.cu_seqlens_k,
            max_kept=max(kept),
        )
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of both pools, head room included."""
        return self.k.nbytes + self.v.nbytes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write new rows k, v `[num_seqs, num_kv_heads, n, d]` behind the live ones; grow if full.

        Without growth: no sync, no allocation.
        """
        num_seqs, num_kv_heads, n, _ = k.shape
        if n > self.room:
            self._grow(max(n, GROWTH, max(self.capacities) // 4))
        self.backend.append_kv(
            k.reshape(num_seqs * num_kv_heads, n, 1, k.shape[-1]),
            v.reshape(num_seqs * num_kv_heads, n, 1, v.shape[-1]),
            self.k,
            self.v,
            self.cu_seqlens_k,
            self.seqused_k,
        )
        self.room -= n

    def attend(self, q: Tensor, softmax_scale: float) -> Tensor:
        """Causal attention of the last n rows q `[num_seqs, num_heads, n, d]` over all live ones.

        Returns `[num_seqs, n, num_heads, d_v]`. More than 16 rows (a later turn of a dialogue) go
        through torch's SDPA on a padded copy of this layer's cache.
        """
        num_seqs, num_heads, n, d = q.shape
        segments, group = num_seqs * self.num_kv_heads, num_heads // self.num_kv_heads
        if n > MAX_DECODE_ROWS:
            out = self._attend_turn(q.reshape(segments, group, n, d), softmax_scale)
            out = out.reshape(num_seqs, num_heads, n, -1).transpose(1, 2)
            return out.contiguous()
        rows = q.reshape(segments, group, n, d).transpose(1, 2).reshape(segments * n, group, d)
        out = self.backend.varlen_decode(
            rows,
            self.k,
            self.v,
            torch.arange(0, segments * n + 1, n, dtype=torch.int32, device=q.device),
            self.cu_seqlens_k,
            n,
            max(self.capacities),
            softmax_scale=softmax_scale,
            seqused_k=self.seqused_k,
        )
        out = out.view(num_seqs, self.num_kv_heads, n, group, -1).transpose(1, 2)
        return out.reshape(num_seqs, n, num_heads, -1)

    def select_sequences(self, index: Tensor) -> None:
        """Make sequence i of the cache what sequence `index[i]` was; may repeat or drop some.

        Copies the cache once: beam search pays this at every step.
        """
        heads = torch.arange(self.num_kv_heads)
        segments = (index.cpu()[:, None] * self.num_kv_heads + heads).reshape(-1)
        capacities = [self.capacities[s] for s in segments.tolist()]
        segments = segments.to(self.k.device)
        starts = _starts(capacities, self.k.device)
        offset = self.cu_seqlens_k[segments] - starts[:-1]
        rows = torch.arange(sum(capacities), device=self.k.device)
        rows = rows + offset.repeat_interleave(torch.tensor(capacities, device=self.k.device))
        self.k, self.v = self.k[rows], self.v[rows]
        self.seqused_k = self.seqused_k[segments]
        self.capacities, self.cu_seqlens_k = capacities, starts

    def _grow(self, extra: int) -> None:
        """Give every segment `extra` rows more; copies the cache once."""
        capacities = torch.tensor(self.capacities, device=self.k.device)
        segment = torch.arange(len(self.capacities), device=self.k.device)
        rows = torch.arange(len(self.k), device=self.k.device)
        rows = rows + extra * segment.repeat_interleave(capacities)
        total = len(self.k) + extra * len(self.capacities)
        for name in ("k", "v"):  # one after the other: the peak is one pool's copy
            pool = getattr(self, name)
            grown = pool.new_empty(total, 1, pool.shape[-1])
            grown[rows] = pool
            setattr(self, name, grown)
        self.capacities = [n + extra for n in self.capacities]
        self.cu_seqlens_k = _starts(self.capacities, self.k.device)
        self.room += extra

    def _attend_turn(self, q: Tensor, softmax_scale: float) -> Tensor:
        """q `[num_segments, group, n, d]` -> `[num_segments, group, n, d_v]`, n of any size."""
        n = q.shape[2]
        live = self.seqused_k.long()[:, None]
        column = torch.arange(max(self.capacities), device=q.device)
        # Columns behind a segment's end repeat its last live row: masked, but finite.
        rows = self.cu_seqlens_k[:-1].long()[:, None] + column.minimum(live - 1)
        k = self.k[rows].transpose(1, 2)  # [num_segments, 1, capacity, d]
        v = self.v[rows].transpose(1, 2)
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        parts = []
        for first in range(0, n, ROWS_AT_ONCE):
            row = torch.arange(first, min(first + ROWS_AT_ONCE, n), device=q.device)
            mask = column <= (live - n)[..., None] + row[:, None]  # [num_segments, rows, capacity]
            part = F.scaled_dot_product_attention(
                q[:, :, first : first + ROWS_AT_ONCE],
                k,
                v,
                attn_mask=mask[:, None],
                scale=softmax_scale,
            )
            parts.append(part)
        return torch.cat(parts, 2)


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
