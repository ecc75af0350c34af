"""Device code of remainder.py: sums of evicted rows, and their means in a pool."""

import triton
import triton.language as tl

from . import profiling
from .addressing import live_length, load_rows, row_offsets, sequence_start
from .compact_kernels import INTEGERS
from .fp8 import quantised


@triton.jit(
    do_not_specialize=["num_kv_heads", "max_blocks"],
    do_not_specialize_on_alignment=[*INTEGERS, "seqused_k_ptr"],
    launch_metadata=profiling.sum_evicted,
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
    start = sequence_start(seq, cu_seqlens_k_ptr, block_table_ptr, max_blocks)
    length = live_length(seq, cu_seqlens_k_ptr, seqused_k_ptr, False)
    k_ptr += head * stride_k_head
    v_ptr += head * stride_v_head
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, length)

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
        evicted = (positions < end) & (is_kept == 0)
        at = row_offsets(
            positions, evicted, start, block_table_ptr, stride_k_page, stride_k_row, PAGE_SIZE
        )
        sum_k += load_rows(k_ptr, at, evicted, HEAD_SIZE, D)
        at = row_offsets(
            positions, evicted, start, block_table_ptr, stride_v_page, stride_v_row, PAGE_SIZE
        )
        sum_v += load_rows(v_ptr, at, evicted, HEAD_SIZE_V, D)
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
    rows = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, D), tl.float32)
    for i in range(0, num_sums, ROWS):
        total += load_rows(sums_ptr, (i + rows) * HEAD_SIZE, i + rows < num_sums, HEAD_SIZE, D)
    return tl.sum(total, 0) / count.to(tl.float32)


@triton.jit(
    do_not_specialize=["num_sums", "out_max_blocks"],
    do_not_specialize_on_alignment=[
        "counts_ptr",
        "cu_seqlens_out_ptr",
        "out_block_table_ptr",
        "k_descale_ptr",
        "v_descale_ptr",
    ],
    launch_metadata=profiling.store_means,
)
def _store_means_kernel(
    sum_k_ptr,  # [num_segments, num_sums, d]
    sum_v_ptr,  # [num_segments, num_sums, d_v]
    counts_ptr,  # [num_segments]
    out_k_ptr,
    out_v_ptr,
    cu_seqlens_out_ptr,
    out_block_table_ptr,
    k_descale_ptr,  # [num_segments], or None
    v_descale_ptr,
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
        start = sequence_start(segment, cu_seqlens_out_ptr, out_block_table_ptr, out_max_blocks)
        if out_block_table_ptr is None:
            place = start.to(tl.int64)
        else:
            place = tl.load(out_block_table_ptr + start).to(tl.int64)
        dims = tl.arange(0, D)
        sums = sum_k_ptr + segment * num_sums * HEAD_SIZE
        mean = _mean(sums, num_sums, count, HEAD_SIZE, D, ROWS)
        if k_descale_ptr is not None:
            mean = quantised(mean, tl.load(k_descale_ptr + segment))
        mean = mean.to(out_k_ptr.dtype.element_ty)
        tl.store(out_k_ptr + place * stride_out_k + dims, mean, mask=dims < HEAD_SIZE)
        sums = sum_v_ptr + segment * num_sums * HEAD_SIZE_V
        mean = _mean(sums, num_sums, count, HEAD_SIZE_V, D, ROWS)
        if v_descale_ptr is not None:
            mean = quantised(mean, tl.load(v_descale_ptr + segment))
        mean = mean.to(out_v_ptr.dtype.element_ty)
        tl.store(out_v_ptr + place * stride_out_v + dims, mean, mask=dims < HEAD_SIZE_V)
