"""The compressed cache: every (layer, sequence, KV head) a varlen segment of one pool."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.checks import FP8
from ..kernels.types import MAX_SEQLEN_Q
from ..ops import Backend, get_backend
from ..recipe.plan import CompressionPlan
from ..recipe.prompt import to_device
from ..recipe.softmax import Softmax
from ..recipe.turn import Eviction
from .attention import torch_attention
from .shape import PoolShape, kind_of

ROWS_AT_ONCE = 256  # of a long turn; bounds its attention mask
GROWTH = 128  # rows that full segments grow by, at least


class RaggedCache:
    """K and V pools `[capacity, 1, d]` that flash-attn's varlen interface can read as they are.

    k, v: the pools; rows of a segment behind its live length are undefined.
    cu_seqlens_k: `[num_layers, num_segments + 1]` int32, segment starts, head room included.
    seqused_k: `[num_layers, num_segments]` int32, live lengths; appends advance them on the
        device, and nothing on the host depends on them.
    max_seqlen_k: bound of every segment's rows, head room included.
    room: rows that every segment can still take.
    num_evicted: `[num_layers, num_segments]` int32, n where a segment's first row is the mean of n
        evicted ones, else 0; None in a cache that has no such rows.
    first_key_bias: `[num_layers, num_segments]` fp32, log(n) there, else 0; None likewise.
    dtype: of the rows that come in, and of what they are attended to with.
    k_descale, v_descale: `[num_layers, num_segments, 1]` fp32 where the pools are fp8 (e4m3): what
        is stored times it is the row. Found from what is kept, when it moves in, and the scale of
        all rows that follow; None elsewhere.

    A layer's segments are ordered by sequence, then KV head. Memory: (kept + head room) rows.
    """

    def __init__(self, shape: PoolShape, backend: Backend) -> None:
        self.dtype = shape.dtype
        kind: Any = {"dtype": FP8 if shape.is_fp8 else shape.dtype, "device": shape.device}
        self.k = torch.empty(shape.capacity, 1, shape.head_size, **kind)
        self.v = torch.empty(shape.capacity, 1, shape.v_head_size, **kind)
        num_layers, device = shape.num_layers, shape.device
        num_segments = shape.num_seqs * shape.num_kv_heads
        self.cu_seqlens_k = torch.zeros(
            num_layers, num_segments + 1, dtype=torch.int32, device=device
        )
        self.seqused_k = torch.zeros(num_layers, num_segments, dtype=torch.int32, device=device)
        self.num_evicted: Tensor | None = None
        self.first_key_bias: Tensor | None = None
        if shape.has_remainder:
            self.num_evicted = torch.zeros_like(self.seqused_k)
            self.first_key_bias = torch.zeros(num_layers, num_segments, device=device)
        self.k_descale: Tensor | None = None
        self.v_descale: Tensor | None = None
        if shape.is_fp8:
            self.k_descale, self.v_descale = torch.ones(
                2, num_layers, num_segments, 1, device=device
            )
        self._first_tokens = self.cu_seqlens_k  # where compact_layer begins
        self.num_kv_heads, self.backend = shape.num_kv_heads, backend
        self.max_seqlen_k, self.room = shape.max_seqlen_k, 0
        self._one_row = torch.arange(num_segments + 1, dtype=torch.int32, device=device)
        self._capacities: list[list[int]] = []

    @property
    def shape(self) -> PoolShape:
        """What would make another of these sizes."""
        return PoolShape(
            **(kind_of(self.k, self.v) | {"dtype": self.dtype}),
            num_layers=len(self.seqused_k),
            num_seqs=self.num_seqs,
            num_kv_heads=self.num_kv_heads,
            capacity=len(self.k),
            max_seqlen_k=self.max_seqlen_k,
            has_remainder=self.first_key_bias is not None,
            is_fp8=self.k_descale is not None,
        )

    def lay_out(self, plan: CompressionPlan, room: int) -> None:
        """Place the segments of a new plan, with `room` free rows each; compact_layer fills them,
        then store_means where the plan says so.

        Every tensor stays where it is, so that a captured graph may go on reading it.
        """
        kept = plan.head_keep.flatten(1)  # [num_layers, num_segments]
        evicted = torch.zeros_like(kept) if plan.evicted is None else plan.evicted.flatten(1)
        self._lay_out(kept, evicted, room)

    def _lay_out(self, rows: Tensor, evicted: Tensor, room: int) -> None:
        """Segments of these `rows`, `[num_layers, num_segments]` on the host, the first of which
        stands for `evicted` tokens where these are any."""
        self._place((rows + room).tolist())
        self.seqused_k.copy_(rows)
        self.room = room
        self._first_tokens = self.cu_seqlens_k
        if self.num_evicted is None or self.first_key_bias is None:
            if evicted.any():
                raise ValueError("plan: got rows for what is evicted, expected has_remainder=True")
            return
        self.first_key_bias.copy_(torch.where(evicted > 0, evicted.double().log(), 0.0))
        self.num_evicted.copy_(evicted)
        self._first_tokens = self.cu_seqlens_k.clone()
        self._first_tokens[:, :-1] += self.num_evicted > 0

    def compact_layer(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        cu_seqlens_k: Tensor,
        indices: Tensor,
        cu_kept: Tensor,
        max_kept: int,
    ) -> None:
        """Move the kept tokens of a layer's k and v into its segments, behind the row for the
        evicted ones; arguments as `compact_kv`."""
        kept = cu_seqlens_k, indices, cu_kept
        descales: dict[str, Tensor] = {}
        if self.k_descale is not None and k.dtype != FP8:
            self._find_descales(slice(layer, layer + 1), [k], [v], *kept, max_kept)
            descales = self._descales(layer)
        self.backend.compact_kv(
            k,
            v,
            *kept,
            self.k,
            self.v,
            self._first_tokens[layer],
            max_kept=max_kept,
            **descales,
        )

    def compact_layers(
        self,
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        cu_seqlens_k: Tensor,
        indices: Tensor,
        cu_kept: Tensor,
        max_kept: int,
    ) -> None:
        """compact_layer of all layers, in one launch where their k and v have the same strides."""
        kept = cu_seqlens_k, indices, cu_kept
        if self.k_descale is not None:
            self._find_descales(slice(None), k, v, *kept, max_kept)
        self.backend.compact_layers(
            k,
            v,
            *kept,
            self.k,
            self.v,
            self._first_tokens,
            max_kept=max_kept,
            **self._descales(slice(None)),
        )

    def _find_descales(self, layers: slice, *kept: Any) -> None:
        """Set the scales of these layers, by what is about to move into them."""
        assert self.k_descale is not None and self.v_descale is not None
        k_descale, v_descale = self.backend.kept_descales(*kept[:-1], max_kept=kept[-1])
        self.k_descale[layers].copy_(k_descale)
        self.v_descale[layers].copy_(v_descale)

    def _descales(self, layers: int | slice) -> dict[str, Tensor]:
        """The scales of a layer or more, as the kernels take them."""
        if self.k_descale is None or self.v_descale is None:
            return {}
        return {"k_descale": self.k_descale[layers], "v_descale": self.v_descale[layers]}

    def store_means(self, layer: int, sum_k: Tensor, sum_v: Tensor) -> None:
        """Write the rows that stand for what a layer evicts, from `sum_evicted`'s sums; behind
        compact_layer, which finds the scales."""
        assert self.num_evicted is not None
        pool = self.k, self.v, self.cu_seqlens_k[layer]
        self.backend.store_means(
            sum_k, sum_v, self.num_evicted[layer], *pool, **self._descales(layer)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of both pools, head room included."""
        return self.k.nbytes + self.v.nbytes

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row, K and V."""
        return (self.k.shape[-1] + self.v.shape[-1]) * self.k.element_size()

    @property
    def num_seqs(self) -> int:
        """Sequences of the batch."""
        return self.seqused_k.shape[1] // self.num_kv_heads

    def append(self, layer: int, k: Tensor, v: Tensor, pads: Tensor | None = None) -> None:
        """Write new rows k, v `[num_seqs, num_kv_heads, n, d]` behind a layer's live ones.

        The caller has seen to room (`reserve`), and takes it off `room` once for all layers.
        No sync, and no allocation without pads.

        Args:
            pads: `[num_seqs]` int, how many of each sequence's first rows are pads: left out.
        """
        n = k.shape[2]
        if pads is not None:  # real rows first; what is behind them is not live
            row = torch.arange(n, device=k.device) + pads[:, None]
            row = row.clamp(max=n - 1)[:, None, :, None]
            k, v = k.take_along_dim(row, 2), v.take_along_dim(row, 2)
        self.backend.append_kv(
            k.reshape(-1, n, 1, k.shape[-1]),
            v.reshape(-1, n, 1, v.shape[-1]),
            self.k,
            self.v,
            self.cu_seqlens_k[layer],
            self.seqused_k[layer],
            **self._descales(layer),
        )
        if pads is not None:
            self.seqused_k[layer] -= pads.repeat_interleave(self.num_kv_heads).int()

    def attend(self, layer: int, q: Tensor, softmax: Softmax) -> Tensor:
        """Causal attention of the last n rows q `[num_seqs, num_heads, n, d]` over all live ones.

        Returns `[num_seqs, n, num_heads, d_v]`; the rows of pads are defined, and of no use. More
        than 16 rows (a later turn of a dialogue) go through torch on a padded copy of this layer's
        segments.
        """
        num_seqs, num_heads, n, d = q.shape
        segments, group = num_seqs * self.num_kv_heads, num_heads // self.num_kv_heads
        softmax = softmax.by_kv_head(self.num_kv_heads)
        if n > MAX_SEQLEN_Q:
            rows = q.reshape(segments, group, n, d)
            out = self._attend_turn(layer, rows, softmax)
            return out.reshape(num_seqs, num_heads, n, -1).transpose(1, 2).contiguous()
        rows = q.reshape(segments, group, n, d).transpose(1, 2).reshape(segments * n, group, d)
        out = self.backend.varlen_decode(
            rows,
            self.k,
            self.v,
            self._one_row if n == 1 else self._one_row * n,
            self.cu_seqlens_k[layer],
            n,
            self.max_seqlen_k,
            causal=True,
            seqused_k=self.seqused_k[layer],
            first_key_bias=None if self.first_key_bias is None else self.first_key_bias[layer],
            **softmax._asdict(),
            **self._descales(layer),
        )
        out = out.view(num_seqs, self.num_kv_heads, n, group, -1).transpose(1, 2)
        return out.reshape(num_seqs, n, num_heads, -1)

    def padded(self, layer: int) -> tuple[Tensor, Tensor]:
        """A copy of a layer's k and v `[num_segments, max_seqlen_k, d]` in `dtype`; rows behind a
        segment's end repeat its last live one, and are finite so."""
        live = self.seqused_k[layer].long()[:, None]
        column = torch.arange(self.max_seqlen_k, device=self.k.device)
        rows = self.cu_seqlens_k[layer, :-1].long()[:, None] + column.minimum(live - 1)
        return self._read(layer, rows)

    def _read(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `[num_segments, n]` of the pools, of a layer, in `dtype`."""
        k, v = self.k[rows, 0], self.v[rows, 0]
        if self.k_descale is None or self.v_descale is None:
            return k, v
        k = k.float() * self.k_descale[layer, :, None]
        v = v.float() * self.v_descale[layer, :, None]
        return k.to(self.dtype), v.to(self.dtype)

    def evict(
        self,
        eviction: Eviction,
        room: int,
        allocate: Callable[..., RaggedCache] | None = None,
        *,
        is_fp8: bool = False,
    ) -> RaggedCache:
        """What stays of every segment, in another cache, with `room` free rows a segment.

        A row that stands for evicted tokens takes those in that join them.

        Args:
            is_fp8: whether the other is to be fp8, if this one is not: rows of fp8 keep their scale
                and move as they are.
            allocate: makes the other cache, of this size or larger; arguments as for RaggedCache.
        """
        self.check_room()
        tokens, evicted = eviction.tokens, eviction.evicted
        if self.num_evicted is not None:
            evicted = evicted + self.num_evicted.cpu()
        rows = tokens + (evicted > 0).long()
        num_layers, num_segments = rows.shape
        shape = dataclasses.replace(
            self.shape,
            capacity=int(rows.sum()) + rows.numel() * room,
            max_seqlen_k=int(rows.max()) + room,
            is_fp8=is_fp8 or self.k_descale is not None,
        )
        other = (allocate or RaggedCache)(shape, self.backend)
        other._lay_out(rows, evicted, room)
        other._take_descales(self)
        cu_kept = torch.tensor([0, *accumulate(tokens.flatten().tolist())], dtype=torch.int32)
        cu_kept = to_device(cu_kept, self.k.device)
        for layer in range(num_layers):
            kept = (
                self.cu_seqlens_k[layer],
                eviction.indices,
                cu_kept[layer * num_segments : (layer + 1) * num_segments + 1],
            )
            other.compact_layer(layer, self.k, self.v, *kept, int(tokens[layer].max()))
            if self.num_evicted is None:
                continue
            sums = self._sum_evicted(layer, *kept)
            # A row that stood for n tokens is among them, once.
            again = (self.num_evicted[layer] - 1).clamp(min=0)[:, None, None]
            first = self._read(layer, self.cu_seqlens_k[layer, :-1, None].long())
            sum_k, sum_v = (
                torch.cat([sums_, row.float() * again], 1)
                for sums_, row in zip(sums, first, strict=True)
            )
            other.store_means(layer, sum_k, sum_v)
        return other

    def _sum_evicted(
        self, layer: int, starts: Tensor, indices: Tensor, cu_kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of a layer's rows that are not kept, arguments as `sum_evicted`: of what they stand
        for, so that rows of fp8 are copied before."""
        k, v = self.k, self.v
        if self.k_descale is not None:
            k, v = (x.flatten(0, 1)[:, None] for x in self.padded(layer))
            starts = self._one_row * self.max_seqlen_k
        live = self.seqused_k[layer]
        return self.backend.sum_evicted(
            k, v, starts, indices, cu_kept, self.max_seqlen_k, seqused_k=live
        )

    def _take_descales(self, other: RaggedCache) -> None:
        """Scales of another cache of as many segments, where it has some."""
        if self.k_descale is None or other.k_descale is None:
            return
        assert self.v_descale is not None and other.v_descale is not None
        self.k_descale.copy_(other.k_descale)
        self.v_descale.copy_(other.v_descale)

    def reserve(self, n: int) -> bool:
        """See to room for n rows more in every segment. True if tensors had to move.

        Growth copies the pools once, and is by a quarter at least.
        """
        if n <= self.room:
            return False
        extra = max(n - self.room, GROWTH, self.max_seqlen_k // 4)
        self._rearrange([[c + extra for c in row] for row in self._capacities], None)
        self.room += extra
        return True

    def check_room(self) -> None:
        """See that no row was lost: one that finds no room is dropped, and counted all the same, so
        that lengths tell. Waits for the device; captured steps need nothing for it.

        Raises:
            RuntimeError: where some were. What is attended to from then on lacks them.
        """
        lost = (self.seqused_k - self.cu_seqlens_k.diff(dim=1)).clamp(min=0)
        if (num_lost := int(lost.sum())) > 0:
            raise RuntimeError(
                f"VLCache: got {num_lost} rows of new tokens that found no room in their segments,"
                " so that answers lack them; expected room for all of a step before it: by"
                " RaggedCache.reserve, or a larger max_new_tokens (head room)"
            )

    def select_sequences(self, index: Tensor) -> None:
        """Make sequence i of the cache what sequence `index[i]` was; may repeat or drop some.

        Copies the pools once: beam search pays this at every step.
        """
        heads = torch.arange(self.num_kv_heads)
        segments = (index.cpu()[:, None] * self.num_kv_heads + heads).reshape(-1)
        capacities = [[row[s] for s in segments.tolist()] for row in self._capacities]
        self._rearrange(capacities, segments.to(self.k.device))

    def copy(self, allocate: Callable[..., RaggedCache] | None = None) -> RaggedCache:
        """The same segments in pools of their own.

        Args:
            allocate: makes the copy, of its sizes or larger ones; arguments as for RaggedCache.
        """
        rows = sum(map(sum, self._capacities))
        shape = dataclasses.replace(self.shape, capacity=rows)
        other = (allocate or RaggedCache)(shape, self.backend)
        other._place(self._capacities)
        for mine, its in ((self.k, other.k), (self.v, other.v)):
            its[:rows].copy_(mine[:rows])
        other.seqused_k.copy_(self.seqused_k)
        if self.first_key_bias is not None and self.num_evicted is not None:
            assert other.first_key_bias is not None and other.num_evicted is not None
            other.first_key_bias.copy_(self.first_key_bias)
            other.num_evicted.copy_(self.num_evicted)
        other._take_descales(self)
        other.room = self.room
        return other

    def __deepcopy__(self, memo: dict) -> RaggedCache:
        return self.copy()

    def __getstate__(self) -> dict[str, Any]:
        """The live rows alone: what else is in the pools may never have been written."""
        live = object.__new__(RaggedCache)
        vars(live).update(vars(self), _first_tokens=None)
        live._rearrange(self.seqused_k.tolist(), None)
        if self.k_descale is not None:  # torch cannot unpickle fp8, but by torch.load
            live.k, live.v = live.k.view(torch.uint8), live.v.view(torch.uint8)
        return {name: x for name, x in vars(live).items() if name != "backend"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Head room as it was; the backend is the device's own, whatever it was."""
        vars(self).update(state)
        if self.k_descale is not None:
            self.k, self.v = self.k.view(FP8), self.v.view(FP8)
        self.backend = get_backend("auto", self.k.device)
        self._rearrange([[rows + self.room for rows in row] for row in self._capacities], None)
        self._first_tokens = self.cu_seqlens_k

    def _place(self, capacities: list[list[int]]) -> None:
        """Lay segments of these capacities one behind the other, layer by layer."""
        first, starts = 0, []
        for row in capacities:
            starts.append(list(accumulate(row, initial=first)))
            first = starts[-1][-1]
        self.cu_seqlens_k.copy_(torch.tensor(starts, dtype=torch.int32))
        self._capacities = capacities
        self.max_seqlen_k = max(self.max_seqlen_k, *(c for row in capacities for c in row))

    def _rearrange(self, capacities: list[list[int]], segments: Tensor | None) -> None:
        """Move segments (all, or a choice) to places of new capacities, in new tensors."""
        self.check_room()  # with more of it, the lengths would no longer tell
        device, num_layers = self.k.device, len(capacities)
        old_starts, live = self.cu_seqlens_k[:, :-1], self.seqused_k
        if segments is not None:
            old_starts, live = old_starts[:, segments], live[:, segments]
        self.seqused_k = live.clone()
        if self.first_key_bias is not None and segments is not None:
            assert self.num_evicted is not None
            self.first_key_bias = self.first_key_bias[:, segments]
            self.num_evicted = self.num_evicted[:, segments]
        if self.k_descale is not None and segments is not None:
            assert self.v_descale is not None
            self.k_descale = self.k_descale[:, segments]
            self.v_descale = self.v_descale[:, segments]
        self._one_row = torch.arange(live.shape[1] + 1, dtype=torch.int32, device=device)
        self.cu_seqlens_k = self.cu_seqlens_k.new_empty(num_layers, live.shape[1] + 1)
        self._place(capacities)
        flat = torch.tensor(capacities, device=device).reshape(-1)
        new_starts = self.cu_seqlens_k[:, :-1].reshape(-1).long()
        column = torch.arange(int(flat.sum()), device=device) - new_starts.repeat_interleave(flat)
        # Head room repeats the last live row: any row will do, and this one exists.
        last = (live.reshape(-1).long() - 1).clamp(min=0).repeat_interleave(flat)
        rows = old_starts.reshape(-1).long().repeat_interleave(flat) + column.minimum(last)
        rows.clamp_(max=len(self.k) - 1)  # of an empty segment at the end, without head room
        self.k = self.k[rows]
        self.v = self.v[rows]

    def _attend_turn(self, layer: int, q: Tensor, softmax: Softmax) -> Tensor:
        """q `[num_segments, group, n, d]` -> `[num_segments, group, n, d_v]`, n of any size."""
        n = q.shape[2]
        live = self.seqused_k[layer].long()[:, None]
        column = torch.arange(self.max_seqlen_k, device=q.device)
        k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in self.padded(layer))
        parts = []
        for first in range(0, n, ROWS_AT_ONCE):
            row = torch.arange(first, min(first + ROWS_AT_ONCE, n), device=q.device)
            last = (live - n)[..., None] + row[:, None]
            mask = column <= last.clamp(min=0)  # [num_segments, rows, columns]; pads see something
            if self.first_key_bias is not None:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
                mask[..., 0] += self.first_key_bias[layer, :, None]
            part, mask = q[:, :, first : first + ROWS_AT_ONCE], mask[:, None]
            if softmax.is_plain:
                scale = softmax.softmax_scale
                part = F.scaled_dot_product_attention(part, k, v, mask, scale=scale)
            else:
                part = torch_attention(part, k, v, mask, softmax)
            parts.append(part)
        return torch.cat(parts, 2)
