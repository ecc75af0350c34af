"""Device code of descales.py: the largest magnitude among the kept rows of each segment."""

import triton
import triton.language as tl

from . import profiling
from .addressing import load_rows, row_offsets, sequence_start
from .compact_kernels import INTEGERS, source_of_layer


@triton.jit(
    do_not_specialize=["num_kv_heads", "num_segments", "max_blocks"],
    do_not_specialize_on_alignment=[*INTEGERS, "amax_k_ptr", "amax_v_ptr"],
    launch_metadata=profiling.kept_amax,
)
def _kept_amax_kernel(
    k_ptr,
    v_ptr,
    layers_ptr,  # [sources, 3] int64, as _compact_kernel has it, or None
    cu_seqlens_k_ptr,
    indices_ptr,
    cu_kept_ptr,
    block_table_ptr,
    num_kv_heads,
    num_segments,  # of a layer
    max_blocks,
    stride_k_page,
    stride_k_row,
    stride_k_head,
    stride_v_page,
    stride_v_row,
    stride_v_head,
    amax_k_ptr,  # [num_layers, num_segments] int32, the bits of an fp32; 0 before
    amax_v_ptr,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile of ROWS kept rows of one segment, of one layer."""
    segment = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    if layers_ptr is not None:
        source, segment = segment // num_segments, segment % num_segments
        layer, k_ptr, v_ptr = source_of_layer(source, k_ptr, v_ptr, layers_ptr, ALIGNED)
        cu_kept_ptr += layer * num_segments
        amax_k_ptr += layer * num_segments
        amax_v_ptr += layer * num_segments
    first = tl.load(cu_kept_ptr + segment)
    kept = tl.load(cu_kept_ptr + segment + 1) - first
    if tile * ROWS < kept:
        seq, head = segment // num_kv_heads, segment % num_kv_heads
        start = sequence_start(seq, cu_seqlens_k_ptr, block_table_ptr, max_blocks)
        targets = tile * ROWS + tl.arange(0, ROWS)
        live = targets < kept
        positions = tl.load(indices_ptr + first.to(tl.int64) + targets, mask=live, other=0)
        at = row_offsets(
            positions, live, start, block_table_ptr, stride_k_page, stride_k_row, PAGE_SIZE
        )
        k = load_rows(k_ptr, at + head * stride_k_head, live, HEAD_SIZE, D)
        at = row_offsets(
            positions, live, start, block_table_ptr, stride_v_page, stride_v_row, PAGE_SIZE
        )
        v = load_rows(v_ptr, at + head * stride_v_head, live, HEAD_SIZE_V, D)
        # Bits of floats that are not negative are in their order; a maximum is the same in any.
        amax = tl.max(tl.max(tl.abs(k).to(tl.float32), 1), 0)
        tl.atomic_max(amax_k_ptr + segment, amax.to(tl.int32, bitcast=True), sem="relaxed")
        amax = tl.max(tl.max(tl.abs(v).to(tl.float32), 1), 0)
        tl.atomic_max(amax_v_ptr + segment, amax.to(tl.int32, bitcast=True), sem="relaxed")
