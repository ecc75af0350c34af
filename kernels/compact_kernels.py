"""Device code of compact.py: rows of K and V moved into a pool, or to the front in place."""

import triton
import triton.language as tl

from . import profiling
from .addressing import load_rows, row_offsets, sequence_start, store_rows
from .fp8 import quantised

# Single elements are read of these, or runs that start anywhere: where a layer's part of a tensor
# starts is no reason to compile anew.
INTEGERS = ["cu_seqlens_k_ptr", "indices_ptr", "cu_kept_ptr", "block_table_ptr"]


@triton.jit
def source_of_layer(source, k_ptr, v_ptr, layers_ptr, ALIGNED: tl.constexpr):
    """The number of a layer among those of the launch, and where its K and V lie: an address says
    nothing of its type, for which k_ptr and v_ptr are, nor of its alignment."""
    entry = layers_ptr + 3 * source
    k_ptr = tl.load(entry + 1).to(k_ptr.dtype)
    v_ptr = tl.load(entry + 2).to(v_ptr.dtype)
    if ALIGNED:
        k_ptr, v_ptr = tl.multiple_of(k_ptr, 16), tl.multiple_of(v_ptr, 16)
    return tl.load(entry), k_ptr, v_ptr


@triton.jit(
    do_not_specialize=["num_kv_heads", "num_segments", "max_blocks", "out_max_blocks"],
    do_not_specialize_on_alignment=[
        *INTEGERS,
        "cu_seqlens_out_ptr",
        "out_block_table_ptr",
        "k_descale_ptr",
        "v_descale_ptr",
    ],
    launch_metadata=profiling.compact,
)
def _compact_kernel(
    k_ptr,
    v_ptr,
    layers_ptr,  # [sources, 3] int64: which layer, addresses of its k and v; None: k_ptr, v_ptr
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
    out_k_ptr,
    out_v_ptr,
    cu_seqlens_out_ptr,
    out_block_table_ptr,
    k_descale_ptr,  # [num_layers, num_segments], or None: rows move as they are
    v_descale_ptr,
    out_max_blocks,
    stride_out_k_page,
    stride_out_k_row,
    stride_out_v_page,
    stride_out_v_row,
    PAGE_SIZE: tl.constexpr,
    OUT_PAGE_SIZE: tl.constexpr,
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
        cu_seqlens_out_ptr += layer * (num_segments + 1)
        if k_descale_ptr is not None:
            k_descale_ptr += layer * num_segments
        if v_descale_ptr is not None:
            v_descale_ptr += layer * num_segments
    first = tl.load(cu_kept_ptr + segment)
    kept = tl.load(cu_kept_ptr + segment + 1) - first
    if tile * ROWS < kept:
        seq, head = segment // num_kv_heads, segment % num_kv_heads
        start = sequence_start(seq, cu_seqlens_k_ptr, block_table_ptr, max_blocks)
        start_out = sequence_start(segment, cu_seqlens_out_ptr, out_block_table_ptr, out_max_blocks)
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
        at = row_offsets(
            targets,
            live,
            start_out,
            out_block_table_ptr,
            stride_out_k_page,
            stride_out_k_row,
            OUT_PAGE_SIZE,
        )
        if k_descale_ptr is not None:
            k = quantised(k, tl.load(k_descale_ptr + segment))
        store_rows(out_k_ptr, at, k, live, HEAD_SIZE, D)
        at = row_offsets(
            targets,
            live,
            start_out,
            out_block_table_ptr,
            stride_out_v_page,
            stride_out_v_row,
            OUT_PAGE_SIZE,
        )
        if v_descale_ptr is not None:
            v = quantised(v, tl.load(v_descale_ptr + segment))
        store_rows(out_v_ptr, at, v, live, HEAD_SIZE_V, D)


@triton.jit
def _move_to_front(
    x_ptr,  # at the head
    kept,
    columns,  # [COLUMNS]
    indices_ptr,  # at the segment
    start,
    block_table_ptr,
    stride_page,
    stride_row,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some columns of a segment's kept rows, tile by tile.

    Kept positions ascend, so kept row j lies at a position >= j: the tile that starts at row t
    reads positions >= t and writes positions [t, t + ROWS), which no later tile reads. So a tile
    may be written once it has been read whole, which the barrier sees to: behind it, PTX has all
    earlier reads of the block performed. And the next may be read while the writes are under way.
    Where it lies is known by then. Its rows are not carried through the loop: Triton carries 16-bit
    elements one by one, and their moves would wait for the reads before the writes.
    """
    targets = tl.arange(0, ROWS)
    positions = tl.load(indices_ptr + targets, mask=targets < kept, other=0)
    for first in range(0, kept, ROWS):
        targets = first + tl.arange(0, ROWS)
        live = targets < kept
        at = row_offsets(
            positions, live, start, block_table_ptr, stride_page, stride_row, PAGE_SIZE
        )
        mask = live[:, None] & (columns < HEAD_SIZE)[None, :]
        tile = tl.load(x_ptr + at[:, None] + columns[None, :], mask=mask)
        coming = targets + ROWS
        positions = tl.load(indices_ptr + coming, mask=coming < kept, other=0)
        at = row_offsets(targets, live, start, block_table_ptr, stride_page, stride_row, PAGE_SIZE)
        tl.debug_barrier()  # every warp has read its part of the tile
        tl.store(x_ptr + at[:, None] + columns[None, :], tile, mask=mask)


@triton.jit(
    do_not_specialize=["num_kv_heads", "max_blocks"],
    do_not_specialize_on_alignment=INTEGERS,
    launch_metadata=profiling.compact,
)
def _compact_in_place_kernel(
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
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    COLUMNS_K: tl.constexpr,
    COLUMNS_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """All kept rows of one segment, but COLUMNS of K or of V."""
    SLICES_K: tl.constexpr = (HEAD_SIZE + COLUMNS_K - 1) // COLUMNS_K
    segment, column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(cu_kept_ptr + segment)
    kept = tl.load(cu_kept_ptr + segment + 1) - first
    seq, head = segment // num_kv_heads, segment % num_kv_heads
    start = sequence_start(seq, cu_seqlens_k_ptr, block_table_ptr, max_blocks)
    if column < SLICES_K:
        _move_to_front(
            k_ptr + head * stride_k_head,
            kept,
            column * COLUMNS_K + tl.arange(0, COLUMNS_K),
            indices_ptr + first,
            start,
            block_table_ptr,
            stride_k_page,
            stride_k_row,
            PAGE_SIZE,
            HEAD_SIZE,
            ROWS,
        )
    else:
        _move_to_front(
            v_ptr + head * stride_v_head,
            kept,
            (column - SLICES_K) * COLUMNS_V + tl.arange(0, COLUMNS_V),
            indices_ptr + first,
            start,
            block_table_ptr,
            stride_v_page,
            stride_v_row,
            PAGE_SIZE,
            HEAD_SIZE_V,
            ROWS,
        )
