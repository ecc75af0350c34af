"""Device code of key_value_stats.py: sums of unit keys, their means, and cosines to these."""

import triton
import triton.language as tl

from . import profiling
from .addressing import live_length, load_rows, row_offsets, sequence_start

# Single elements are read of these: where one starts is no reason to compile anew.
INTEGERS = ["cu_seqlens_k_ptr", "seqused_k_ptr", "block_table_ptr"]
LEAST_NORM = tl.constexpr(1e-12)  # a key of zeros has no direction: its cosine is 0


@triton.jit
def _norm(x):
    """`[ROWS]` of x `[ROWS, D]` fp32, above 0."""
    return tl.maximum(tl.sqrt(tl.sum(x * x, 1)), LEAST_NORM)


@triton.jit(
    do_not_specialize=["num_kv_heads", "total_k", "max_blocks"],
    do_not_specialize_on_alignment=INTEGERS,
    launch_metadata=profiling.unit_key_sums,
)
def _sum_kernel(
    k_ptr,
    v_ptr,
    cu_seqlens_k_ptr,
    seqused_k_ptr,
    block_table_ptr,
    sum_ptr,  # [num_segments, num_chunks, d]
    value_norm_ptr,  # [num_kv_heads, total_k]
    num_kv_heads,
    total_k,
    max_blocks,
    stride_k_page,
    stride_k_row,
    stride_k_head,
    stride_v_page,
    stride_v_row,
    stride_v_head,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The sum of CHUNK unit keys of one segment, and the norms of their values."""
    segment, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seq, head = segment // num_kv_heads, segment % num_kv_heads
    start = sequence_start(seq, cu_seqlens_k_ptr, block_table_ptr, max_blocks)
    length = live_length(seq, cu_seqlens_k_ptr, seqused_k_ptr, True)
    k_ptr += head * stride_k_head
    v_ptr += head * stride_v_head
    value_norm_ptr += head * total_k + tl.load(cu_seqlens_k_ptr + seq)
    dims = tl.arange(0, D)
    total = tl.zeros((ROWS, D), tl.float32)
    begin = chunk * CHUNK
    for position in range(begin, tl.minimum(begin + CHUNK, length), ROWS):
        positions = position + tl.arange(0, ROWS)
        live = positions < length
        at = row_offsets(
            positions, live, start, block_table_ptr, stride_k_page, stride_k_row, PAGE_SIZE
        )
        k = load_rows(k_ptr, at, live, HEAD_SIZE, D).to(tl.float32)
        total += k / _norm(k)[:, None]
        at = row_offsets(
            positions, live, start, block_table_ptr, stride_v_page, stride_v_row, PAGE_SIZE
        )
        v = load_rows(v_ptr, at, live, HEAD_SIZE_V, D).to(tl.float32)
        tl.store(value_norm_ptr + positions, tl.sqrt(tl.sum(v * v, 1)), mask=live)
    place = sum_ptr + (segment * tl.num_programs(1) + chunk) * HEAD_SIZE
    tl.store(place + dims, tl.sum(total, 0), mask=dims < HEAD_SIZE)


@triton.jit(
    do_not_specialize=["num_kv_heads", "num_chunks"],
    do_not_specialize_on_alignment=INTEGERS,
    launch_metadata=profiling.mean_unit_keys,
)
def _mean_kernel(
    sum_ptr,  # [num_segments, num_chunks, d]
    cu_seqlens_k_ptr,
    seqused_k_ptr,
    mean_ptr,  # [num_segments, d]
    mean_norm_ptr,  # [num_segments]
    num_kv_heads,
    num_chunks,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The mean unit key of one segment and its norm; 0 where it has no key."""
    segment = tl.program_id(0).to(tl.int64)
    length = live_length(segment // num_kv_heads, cu_seqlens_k_ptr, seqused_k_ptr, True)
    sum_ptr += segment * num_chunks * HEAD_SIZE
    rows, dims = tl.arange(0, ROWS), tl.arange(0, D)
    total = tl.zeros((ROWS, D), tl.float32)
    for i in range(0, num_chunks, ROWS):
        chunks = i + rows
        total += load_rows(sum_ptr, chunks * HEAD_SIZE, chunks < num_chunks, HEAD_SIZE, D)
    mean = tl.sum(total, 0) / tl.maximum(length, 1).to(tl.float32)
    tl.store(mean_ptr + segment * HEAD_SIZE + dims, mean, mask=dims < HEAD_SIZE)
    tl.store(mean_norm_ptr + segment, tl.sqrt(tl.sum(mean * mean, 0)))


@triton.jit(
    do_not_specialize=["num_kv_heads", "total_k", "max_blocks"],
    do_not_specialize_on_alignment=INTEGERS,
    launch_metadata=profiling.key_cosines,
)
def _cosine_kernel(
    k_ptr,
    cu_seqlens_k_ptr,
    seqused_k_ptr,
    block_table_ptr,
    mean_ptr,  # [num_segments, d]
    mean_norm_ptr,  # [num_segments]
    key_cosine_ptr,  # [num_kv_heads, total_k]
    num_kv_heads,
    total_k,
    max_blocks,
    stride_k_page,
    stride_k_row,
    stride_k_head,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The cosine of CHUNK keys of one segment to its mean unit key."""
    segment = tl.program_id(0).to(tl.int64)
    seq, head = segment // num_kv_heads, segment % num_kv_heads
    start = sequence_start(seq, cu_seqlens_k_ptr, block_table_ptr, max_blocks)
    length = live_length(seq, cu_seqlens_k_ptr, seqused_k_ptr, True)
    key_cosine_ptr += head * total_k + tl.load(cu_seqlens_k_ptr + seq)
    dims = tl.arange(0, D)
    mean = tl.load(mean_ptr + segment * HEAD_SIZE + dims, mask=dims < HEAD_SIZE, other=0.0)
    mean /= tl.maximum(tl.load(mean_norm_ptr + segment), LEAST_NORM)
    begin = tl.program_id(1) * CHUNK
    for position in range(begin, tl.minimum(begin + CHUNK, length), ROWS):
        positions = position + tl.arange(0, ROWS)
        live = positions < length
        at = row_offsets(
            positions, live, start, block_table_ptr, stride_k_page, stride_k_row, PAGE_SIZE
        )
        k = load_rows(k_ptr + head * stride_k_head, at, live, HEAD_SIZE, D).to(tl.float32)
        cosine = tl.sum(k * mean[None, :], 1) / _norm(k)
        tl.store(key_cosine_ptr + positions, cosine, mask=live)
