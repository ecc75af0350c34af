"""One row for what is evicted: sums of the rows that a selection leaves out, stored as their mean.

With the logarithm of their number as the first key's bias in `varlen_decode`, the mean row stands
for all of them. Compaction reads the kept rows and this the others, so that each row of K and V is
read once. Nothing adds floats atomically: the sums of a sequence are the same on every run, and
whatever other sequences there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import (
    expect,
    expect_float,
    expect_int32,
    expect_paged_or_packed,
    expect_same_device,
    padded,
)
from .compact import source_arguments, validate_selection
from .compact_kernels import INTEGERS, _rows_of

CHUNK = 256  # rows that one program adds up, so that one long prompt fills the GPU
SUMS_BYTES = 8192  # of the sums that a program has for K, and as many for V


def num_chunks(max_seqlen_k: int) -> int:
    """Partial sums of a segment: one at least."""
    return max(triton.cdiv(max_seqlen_k, CHUNK), 1)


def sum_evicted(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    indices: Tensor,
    cu_kept: Tensor,
    max_seqlen_k: int,
    *,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add up the live rows of one layer's K and V that are not kept, before anything moves.

    Args:
        k, v: `[total_k, num_kv_heads, d]` (`d_v` for v), or pages
            `[num_blocks, page_size, num_kv_heads, d]`; any strides whose last is 1.
        cu_seqlens_k: `[num_seqs + 1]` int32. Starts alone are used with seqused_k; lengths alone
            with pages, and nothing with both.
        indices, cu_kept: this layer's part of a Selection, ascending in each segment: cu_kept is
            `[num_seqs * num_kv_heads + 1]` int32 and may start above 0.
        max_seqlen_k: host upper bound of the live lengths.
        seqused_k: `[num_seqs]` int32, live rows of each sequence; default all.
        block_table: `[num_seqs, max_blocks]` int32.

    Returns:
        Partial sums of k and v, `[num_segments, n, d]` and `[num_segments, n, d_v]` fp32, in the
        order of positions; add up along n, or hand them to `store_means` as they are.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: a dtype that is not fp16, bf16 or fp32.
    """
    num_segments = validate_selection(k, v, cu_seqlens_k, indices, cu_kept, block_table)
    num_seqs = num_segments // k.shape[-2]
    if seqused_k is not None:
        expect_same_device(k=k, seqused_k=seqused_k)
        expect_int32("seqused_k", seqused_k, (num_seqs,))
    else:
        expect_int32("cu_seqlens_k", cu_seqlens_k, (num_seqs + 1,))
    chunks = num_chunks(max_seqlen_k)
    sum_k, sum_v = (
        torch.empty(num_segments, chunks, x.shape[-1], dtype=torch.float32, device=k.device)
        for x in (k, v)
    )
    if num_segments == 0:
        return sum_k, sum_v
    d = padded(max(k.shape[-1], v.shape[-1]))
    with torch.cuda.device_of(k):  # the model may lie on several devices
        _sum_evicted_kernel[(num_segments, chunks)](
            **source_arguments(k, v, cu_seqlens_k, indices, cu_kept, block_table),
            seqused_k_ptr=seqused_k,
            sum_k_ptr=sum_k,
            sum_v_ptr=sum_v,
            D=d,
            ROWS=max(SUMS_BYTES // (4 * d), 1),
            CHUNK=CHUNK,
            num_warps=4,
        )
    return sum_k, sum_v


def store_means(
    sum_k: Tensor,
    sum_v: Tensor,
    counts: Tensor,
    out_k: Tensor,
    out_v: Tensor,
    cu_seqlens_out: Tensor,
    *,
    out_block_table: Tensor | None = None,
) -> None:
    """Write the mean of what was evicted as the first row of each segment of a ragged pool.

    A segment whose count is 0 evicted nothing, and is left as it is.

    Args:
        sum_k, sum_v: `[num_segments, n, d]` (`d_v` for v) fp32, as `sum_evicted` gives them.
        counts: `[num_segments]` int32, how many rows were added up.
        out_k, out_v: `[capacity, 1, d]`, or pages `[num_blocks, page_size, 1, d]`.
        cu_seqlens_out: `[num_segments + 1]` int32, whose starts alone are used; unused for pages.
        out_block_table: `[num_segments, max_blocks]` int32, pages of the pool.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: a dtype that is not fp16, bf16 or fp32.
    """
    paged = out_block_table is not None
    expect_same_device(
        sum_k=sum_k,
        sum_v=sum_v,
        counts=counts,
        out_k=out_k,
        out_v=out_v,
        cu_seqlens_out=cu_seqlens_out,
        out_block_table=out_block_table,
    )
    for name, x, out in (("k", sum_k, out_k), ("v", sum_v, out_v)):
        expect(x.dim() == 3, f"sum_{name}", f"shape {tuple(x.shape)}", "[num_segments, n, d]")
        expect(x.dtype == torch.float32, f"sum_{name}", f"dtype {x.dtype}", "torch.float32")
        expect(x.is_contiguous(), f"sum_{name}", f"strides {x.stride()}", "a contiguous tensor")
        expect_paged_or_packed(f"out_{name}", out, paged)
        expect_float(f"out_{name}", out)
        shape = (1, x.shape[-1])
        got = f"shape {tuple(out.shape)}"
        expect(tuple(out.shape[-2:]) == shape, f"out_{name}", got, f"(..., {shape})")
    num_segments, num_sums, d = sum_k.shape
    same = sum_v.shape[:2] == sum_k.shape[:2]
    expect(same, "sum_v", f"shape {tuple(sum_v.shape)}", f"({num_segments}, {num_sums}, d_v)")
    expect_int32("counts", counts, (num_segments,))
    if out_block_table is None:
        expect_int32("cu_seqlens_out", cu_seqlens_out, (num_segments + 1,))
    else:
        shape = (num_segments, out_block_table.shape[-1])
        expect_int32("out_block_table", out_block_table, shape)
    if num_segments == 0:
        return
    d_v = sum_v.shape[-1]
    widest = padded(max(d, d_v))
    with torch.cuda.device_of(out_k):
        _store_means_kernel[(num_segments,)](
            sum_k_ptr=sum_k,
            sum_v_ptr=sum_v,
            counts_ptr=counts,
            out_k_ptr=out_k,
            out_v_ptr=out_v,
            cu_seqlens_out_ptr=cu_seqlens_out,
            out_block_table_ptr=out_block_table,
            num_sums=num_sums,
            out_max_blocks=0 if out_block_table is None else out_block_table.shape[1],
            stride_out_k=out_k.stride(0),  # of a page, or of a row
            stride_out_v=out_v.stride(0),
            HEAD_SIZE=d,
            HEAD_SIZE_V=d_v,
            D=widest,
            ROWS=max(SUMS_BYTES // (4 * widest), 1),
            num_warps=4,
        )


@triton.jit(
    do_not_specialize=["num_kv_heads", "max_blocks"],
    do_not_specialize_on_alignment=[*INTEGERS, "seqused_k_ptr"],
)
def _sum_evicted_kernel(
    k_ptr,
    v_ptr,
    cu_seqlens_k_ptr,
    indices_ptr,
    cu_kept_ptr,
    block_table_ptr,
    num_kv_heads,
    max_blocks,
    stride_k_page,
    stride_k_row,
    stride_k_head,
    stride_v_page,
    stride_v_row,
    stride_v_head,
    seqused_k_ptr,
    sum_k_ptr,  # [num_segments, num_chunks, d]
    sum_v_ptr,  # [num_segments, num_chunks, d_v]
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The sums of one segment's evicted rows among CHUNK positions; 0 behind the live ones."""
    segment, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(cu_kept_ptr + segment)
    kept = tl.load(cu_kept_ptr + segment + 1) - first
    indices_ptr += first
    seq, head = segment // num_kv_heads, segment % num_kv_heads
    start = cu_seqlens_k_ptr + seq
    if seqused_k_ptr is not None:
        live = tl.load(seqused_k_ptr + seq)
    else:
        live = tl.load(start + 1) - tl.load(start)
    if block_table_ptr is not None:
        block_table_ptr += seq * max_blocks
    k_ptr += head * stride_k_head
    v_ptr += head * stride_v_head
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, live)

    # How many kept positions come before the chunk: they ascend.
    before = tl.full((), 0, tl.int32)
    most = kept
    while before < most:
        middle = (before + most) // 2
        is_before = tl.load(indices_ptr + middle) < begin
        before = tl.where(is_before, middle + 1, before)
        most = tl.where(is_before, most, middle)

    dims = tl.arange(0, D)
    sum_k = tl.zeros((ROWS, D), tl.float32)
    sum_v = tl.zeros((ROWS, D), tl.float32)
    for position in range(begin, end, ROWS):
        positions = position + tl.arange(0, ROWS)
        ranks = before + tl.arange(0, ROWS)
        next_kept = tl.load(indices_ptr + ranks, mask=ranks < kept, other=2**31 - 1)
        is_kept = tl.max((next_kept[:, None] == positions[None, :]).to(tl.int32), 0)
        before += tl.sum((next_kept < position + ROWS).to(tl.int32))
        mask = (positions < end) & (is_kept == 0)
        rows = _rows_of(
            positions, mask, start, block_table_ptr, stride_k_page, stride_k_row, PAGE_SIZE
        )
        mask_k = mask[:, None] & (dims < HEAD_SIZE)[None, :]
        sum_k += tl.load(k_ptr + rows[:, None] + dims[None, :], mask=mask_k, other=0.0)
        rows = _rows_of(
            positions, mask, start, block_table_ptr, stride_v_page, stride_v_row, PAGE_SIZE
        )
        mask_v = mask[:, None] & (dims < HEAD_SIZE_V)[None, :]
        sum_v += tl.load(v_ptr + rows[:, None] + dims[None, :], mask=mask_v, other=0.0)
    place = segment * tl.num_programs(1) + chunk
    tl.store(sum_k_ptr + place * HEAD_SIZE + dims, tl.sum(sum_k, 0), mask=dims < HEAD_SIZE)
    tl.store(sum_v_ptr + place * HEAD_SIZE_V + dims, tl.sum(sum_v, 0), mask=dims < HEAD_SIZE_V)


@triton.jit
def _mean(
    sums_ptr,  # at the segment: [num_sums, HEAD_SIZE]
    num_sums,
    count,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`[D]`, the sums together by the count."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, D)
    total = tl.zeros((ROWS, D), tl.float32)
    for i in range(0, num_sums, ROWS):
        mask = (i + rows < num_sums)[:, None] & (dims < HEAD_SIZE)[None, :]
        part = sums_ptr + (i + rows)[:, None] * HEAD_SIZE + dims[None, :]
        total += tl.load(part, mask=mask, other=0.0)
    return tl.sum(total, 0) / count.to(tl.float32)


@triton.jit(
    do_not_specialize=["num_sums", "out_max_blocks"],
    do_not_specialize_on_alignment=["counts_ptr", "cu_seqlens_out_ptr", "out_block_table_ptr"],
)
def _store_means_kernel(
    sum_k_ptr,  # [num_segments, num_sums, d]
    sum_v_ptr,  # [num_segments, num_sums, d_v]
    counts_ptr,  # [num_segments]
    out_k_ptr,
    out_v_ptr,
    cu_seqlens_out_ptr,
    out_block_table_ptr,
    num_sums,
    out_max_blocks,
    stride_out_k,
    stride_out_v,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The first row of one segment."""
    segment = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + segment)
    if count > 0:
        if out_block_table_ptr is None:
            place = tl.load(cu_seqlens_out_ptr + segment).to(tl.int64)
        else:
            place = tl.load(out_block_table_ptr + segment * out_max_blocks).to(tl.int64)
        dims = tl.arange(0, D)
        sums = sum_k_ptr + segment * num_sums * HEAD_SIZE
        mean = _mean(sums, num_sums, count, HEAD_SIZE, D, ROWS).to(out_k_ptr.dtype.element_ty)
        tl.store(out_k_ptr + place * stride_out_k + dims, mean, mask=dims < HEAD_SIZE)
        sums = sum_v_ptr + segment * num_sums * HEAD_SIZE_V
        mean = _mean(sums, num_sums, count, HEAD_SIZE_V, D, ROWS).to(out_v_ptr.dtype.element_ty)
        tl.store(out_v_ptr + place * stride_out_v + dims, mean, mask=dims < HEAD_SIZE_V)
