"""What the tests of compaction share: caches with rows to keep, pools, and what must come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support import (
    NO_PAGE,
    assert_frame_is_intact,
    assert_identical,
    cumulative,
    framed,
    random_block_table,
    random_varlen,
)
from torch import Tensor

from vlcache_triton.kernels import reference
from vlcache_triton.kernels.compact import compact_kv, compact_kv_

HEAD_ROOM = 3  # rows behind every segment, and before the first
NO_INDEX = torch.iinfo(torch.int32).max  # round a layer's indices: reading one crashes


@dataclass
class Case:
    """Sources, and what is to be kept of them.

    lengths: of each sequence. kept: `[num_seqs * num_kv_heads]` lists of ascending positions.
    k, v: packed, or pages where `block_table` is given.
    """

    lengths: list[int]
    kept: list[list[int]]
    k: Tensor
    v: Tensor
    cu_seqlens_k: Tensor
    block_table: Tensor | None
    indices: Tensor
    cu_kept: Tensor

    @property
    def counts(self) -> list[int]:
        """Kept rows of each segment."""
        return [len(x) for x in self.kept]

    @property
    def selection(self) -> dict[str, Any]:
        """All arguments that compact_kv and compact_kv_ share, but k and v."""
        return dict(
            cu_seqlens_k=self.cu_seqlens_k,
            indices=self.indices,
            cu_kept=self.cu_kept,
            max_kept=max(self.counts, default=0),
            block_table=self.block_table,
        )


def random_case(
    lengths: Sequence[int],
    counts: Sequence[int] | None = None,
    *,
    kept: list[list[int]] | None = None,
    num_kv_heads: int = 2,
    before: int = 0,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **shapes: Any,
) -> Case:
    """`counts` rows of each segment at random, or those that `kept` names; their indices lie
    behind `before` others, as those of a later layer do."""
    generator = torch.Generator().manual_seed(seed)
    if kept is None:
        assert counts is not None
        places = [n for n in lengths for _ in range(num_kv_heads)]
        kept = [
            torch.randperm(n, generator=generator)[:count].sort().values.tolist()
            for n, count in zip(places, counts, strict=True)
        ]
    heads = dict(num_heads=num_kv_heads, num_kv_heads=num_kv_heads)
    batch = random_varlen([0] * len(lengths), lengths, **heads, **shapes, device=device, seed=seed)
    flat = [NO_INDEX] * before + [j for segment in kept for j in segment] + [NO_INDEX] * 5
    indices = torch.tensor(flat, dtype=torch.int32, device=device)
    cu_kept = cumulative([len(x) for x in kept], device) + before
    return Case(
        list(lengths),
        kept,
        batch.k,
        batch.v,
        batch.cu_seqlens_k,
        batch.block_table,
        indices,
        cu_kept,
    )


def rows_of(
    cu_seqlens: Tensor, block_table: Tensor | None, page_size: int, i: int, n: int
) -> list[int]:
    """Flat rows of the first n logical rows of sequence i, one at a time."""
    if block_table is None:
        start = int(cu_seqlens[i])
        return [start + j for j in range(n)]
    pages = block_table[i].tolist()
    return [pages[j // page_size] * page_size + j % page_size for j in range(n)]


def kept_rows(case: Case, x: Tensor, segment: int) -> Tensor:
    """`[kept, d]`, what the segment keeps of k or v."""
    i, head = divmod(segment, x.shape[-2])
    page_size = x.shape[1] if x.dim() == 4 else 1
    rows = rows_of(case.cu_seqlens_k, case.block_table, page_size, i, case.lengths[i])
    return x.reshape(-1, *x.shape[-2:])[[rows[j] for j in case.kept[segment]], head]


def pools(case: Case, page_size: int | None = None) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """out_k and out_v, all NaN, segment starts, block table: every segment with head room."""
    capacities = [n + HEAD_ROOM for n in case.counts]
    starts = cumulative(capacities, case.k.device) + HEAD_ROOM
    table, shape = None, (int(starts[-1]) + HEAD_ROOM,)
    if page_size is not None:
        table = random_block_table(capacities, page_size, case.k.device, seed=5)
        shape = (int((table != NO_PAGE).sum()) + 1, page_size)
    out = [x.new_full((*shape, 1, x.shape[-1]), torch.nan) for x in (case.k, case.v)]
    return out, starts, table


def assert_out_of_place(case: Case, page_size: int | None = None, *, strided: bool = False) -> None:
    """As gathered row by row, and as the reference has it; all else is as before, to the bit.

    strided: sources and pools are views into the middle of larger tensors.
    """
    out, starts, table = pools(case, page_size)
    expected = [x.clone() for x in out]
    for x, pool in zip((case.k, case.v), expected, strict=True):
        for segment, count in enumerate(case.counts):
            rows = rows_of(starts, table, page_size or 1, segment, count)
            pool.view(-1, pool.shape[-1])[rows] = kept_rows(case, x, segment)
    target = dict(cu_seqlens_out=starts, out_block_table=table)
    stock = [x.clone() for x in out]
    reference.compact_kv(case.k, case.v, out_k=stock[0], out_v=stock[1], **target, **case.selection)
    assert_identical(stock, expected)

    sources, frames = [case.k.clone(), case.v.clone()], []
    if strided:
        views = [framed(x) for x in (*sources, *out)]
        (*sources, out_k, out_v), frames = ([view[i] for view in views] for i in range(2))
        out = [out_k, out_v]
    result = compact_kv(*sources, out_k=out[0], out_v=out[1], **target, **case.selection)
    assert result is None
    assert_identical([x.contiguous() for x in out], expected)
    assert_identical([x.contiguous() for x in sources], [case.k, case.v])
    for frame in frames:
        assert_frame_is_intact(frame)


def assert_in_place(case: Case, *, strided: bool = False) -> None:
    """As gathered row by row first and put back then; all else is as before, to the bit."""
    expected = case.k.clone(), case.v.clone()
    for x, target in zip((case.k, case.v), expected, strict=True):
        page_size = x.shape[1] if x.dim() == 4 else 1
        for segment, count in enumerate(case.counts):
            i, head = divmod(segment, x.shape[-2])
            rows = rows_of(case.cu_seqlens_k, case.block_table, page_size, i, count)
            target.view(-1, *x.shape[-2:])[rows, head] = kept_rows(case, x, segment)
    stock = case.k.clone(), case.v.clone()
    reference.compact_kv_(*stock, **case.selection)
    assert_identical(stock, expected)

    moved, frames = [case.k.clone(), case.v.clone()], []
    if strided:
        views = [framed(x) for x in moved]
        moved, frames = ([view[i] for view in views] for i in range(2))
    assert compact_kv_(*moved, **case.selection) is None
    assert_identical([x.contiguous() for x in moved], expected)
    for frame in frames:
        assert_frame_is_intact(frame)
