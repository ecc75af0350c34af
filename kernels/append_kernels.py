"""Device code of append.py: new rows behind the live ones."""

import triton
import triton.language as tl

from . import profiling
from .addressing import load_rows, row_offsets, sequence_start, store_rows
from .fp8 import quantised


@triton.jit(
    do_not_specialize=["n", "num_kv_heads", "max_blocks"],
    do_not_specialize_on_alignment=[  # single elements
        "cu_seqlens_k_ptr",
        "seqused_k_ptr",
        "k_descale_ptr",
        "v_descale_ptr",
    ],
    launch_metadata=profiling.append,
)
def _append_kernel(
    new_k_ptr,  # [num_seqs, n, num_kv_heads, d]
    new_v_ptr,  # [num_seqs, n, num_kv_heads, d_v]
    k_ptr,  # [total_k, num_kv_heads, d] or pages
    v_ptr,
    cu_seqlens_k_ptr,
    seqused_k_ptr,
    block_table_ptr,
    k_descale_ptr,  # [num_seqs, num_kv_heads], or None: rows are stored as they are
    v_descale_ptr,
    n,
    num_kv_heads,
    max_blocks,
    stride_new_k_seq,
    stride_new_k_row,
    stride_new_k_head,
    stride_new_v_seq,
    stride_new_v_row,
    stride_new_v_head,
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
    BLOCK: tl.constexpr,
):
    """All new rows of one sequence; the one program that reads its length also advances it."""
    seq = tl.program_id(0).to(tl.int64)
    used = tl.load(seqused_k_ptr + seq)
    start = sequence_start(seq, cu_seqlens_k_ptr, block_table_ptr, max_blocks)
    if block_table_ptr is None:
        capacity = tl.load(cu_seqlens_k_ptr + seq + 1) - start
    else:
        capacity = max_blocks * PAGE_SIZE
    # Rows of all heads in one run, so that single rows of many heads still fill a tile.
    for item in range(0, n * num_kv_heads, BLOCK):
        items = item + tl.arange(0, BLOCK)
        rows, heads = (items // num_kv_heads).to(tl.int64), (items % num_kv_heads).to(tl.int64)
        positions = used + items // num_kv_heads
        fits = (items < n * num_kv_heads) & (positions >= 0) & (positions < capacity)
        at_k = row_offsets(
            positions, fits, start, block_table_ptr, stride_k_page, stride_k_row, PAGE_SIZE
        )
        at_v = row_offsets(
            positions, fits, start, block_table_ptr, stride_v_page, stride_v_row, PAGE_SIZE
        )
        new_k = seq * stride_new_k_seq + rows * stride_new_k_row + heads * stride_new_k_head
        k = load_rows(new_k_ptr, new_k, fits, HEAD_SIZE, D)
        segments = seq * num_kv_heads + heads
        if k_descale_ptr is not None:
            k = quantised(k, tl.load(k_descale_ptr + segments)[:, None])
        store_rows(k_ptr, at_k + heads * stride_k_head, k, fits, HEAD_SIZE, D)
        new_v = seq * stride_new_v_seq + rows * stride_new_v_row + heads * stride_new_v_head
        v = load_rows(new_v_ptr, new_v, fits, HEAD_SIZE_V, D)
        if v_descale_ptr is not None:
            v = quantised(v, tl.load(v_descale_ptr + segments)[:, None])
        store_rows(v_ptr, at_v + heads * stride_v_head, v, fits, HEAD_SIZE_V, D)
    tl.debug_barrier()  # every warp has read the length that one of them now overwrites
    tl.store(seqused_k_ptr + seq, used + n)
