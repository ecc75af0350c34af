"""Device code of compact.py: rows of K and V moved into a pool, or to the front in place."""

import triton
import triton.language as tl


@triton.jit
def _rows_of(
    positions,  # [ROWS]
    mask,
    start_ptr,  # at the sequence's start; unused for pages
    block_table_ptr,  # at the sequence's row, or None
    stride_page,
    stride_row,
    PAGE_SIZE: tl.constexpr,
):
    """Offsets of logical positions of one sequence."""
    # Not by an early return: Triton compiles what follows it all the same.
    if block_table_ptr is None:
        rows = (tl.load(start_ptr) + positions).to(tl.int64) * stride_row
    else:
        page = tl.load(block_table_ptr + positions // PAGE_SIZE, mask=mask, other=0).to(tl.int64)
        rows = page * stride_page + (positions % PAGE_SIZE).to(tl.int64) * stride_row
    return rows


# Single elements are read of these, or runs that start anywhere: where a layer's part of a tensor
# starts is no reason to compile anew.
INTEGERS = ["cu_seqlens_k_ptr", "indices_ptr", "cu_kept_ptr", "block_table_ptr"]


@triton.jit(
    do_not_specialize=["num_kv_heads", "max_blocks", "out_max_blocks"],
    do_not_specialize_on_alignment=[*INTEGERS, "cu_seqlens_out_ptr", "out_block_table_ptr"],
)
def _compact_kernel(
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
    out_k_ptr,
    out_v_ptr,
    cu_seqlens_out_ptr,
    out_block_table_ptr,
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
):
    """One tile of ROWS kept rows of one segment."""
    segment, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(cu_kept_ptr + segment)
    kept = tl.load(cu_kept_ptr + segment + 1) - first
    if tile * ROWS < kept:
        seq, head = segment // num_kv_heads, segment % num_kv_heads
        if block_table_ptr is not None:
            block_table_ptr += seq * max_blocks
        if out_block_table_ptr is not None:
            out_block_table_ptr += segment * out_max_blocks
        targets = tile * ROWS + tl.arange(0, ROWS)
        mask = targets < kept
        positions = tl.load(indices_ptr + first.to(tl.int64) + targets, mask=mask, other=0)
        dims = tl.arange(0, D)
        mask_k = mask[:, None] & (dims < HEAD_SIZE)[None, :]
        mask_v = mask[:, None] & (dims < HEAD_SIZE_V)[None, :]
        start = cu_seqlens_k_ptr + seq
        start_out = cu_seqlens_out_ptr + segment

        rows = _rows_of(
            positions, mask, start, block_table_ptr, stride_k_page, stride_k_row, PAGE_SIZE
        )
        source = k_ptr + (rows + head * stride_k_head)[:, None] + dims[None, :]
        k = tl.load(source, mask=mask_k)
        rows = _rows_of(
            positions, mask, start, block_table_ptr, stride_v_page, stride_v_row, PAGE_SIZE
        )
        source = v_ptr + (rows + head * stride_v_head)[:, None] + dims[None, :]
        v = tl.load(source, mask=mask_v)
        rows = _rows_of(
            targets,
            mask,
            start_out,
            out_block_table_ptr,
            stride_out_k_page,
            stride_out_k_row,
            OUT_PAGE_SIZE,
        )
        tl.store(out_k_ptr + rows[:, None] + dims[None, :], k, mask=mask_k)
        rows = _rows_of(
            targets,
            mask,
            start_out,
            out_block_table_ptr,
            stride_out_v_page,
            stride_out_v_row,
            OUT_PAGE_SIZE,
        )
        tl.store(out_v_ptr + rows[:, None] + dims[None, :], v, mask=mask_v)


@triton.jit
def _load_kept(
    x_ptr,  # at the head
    targets,  # [ROWS], which of the kept rows
    kept,
    columns,  # [COLUMNS]
    indices_ptr,  # at the segment
    start_ptr,
    block_table_ptr,
    stride_page,
    stride_row,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """Columns of kept rows from where they lie, `[ROWS, COLUMNS]`."""
    mask = targets < kept
    positions = tl.load(indices_ptr + targets, mask=mask, other=0)
    rows = _rows_of(positions, mask, start_ptr, block_table_ptr, stride_page, stride_row, PAGE_SIZE)
    mask_x = mask[:, None] & (columns < HEAD_SIZE)[None, :]
    return tl.load(x_ptr + rows[:, None] + columns[None, :], mask=mask_x)


@triton.jit
def _move_to_front(
    x_ptr,
    kept,
    columns,
    indices_ptr,
    start_ptr,
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
    may be written as soon as it has been read whole, and the next may be read before that.
    """
    targets = tl.arange(0, ROWS)
    tile = _load_kept(
        x_ptr,
        targets,
        kept,
        columns,
        indices_ptr,
        start_ptr,
        block_table_ptr,
        stride_page,
        stride_row,
        PAGE_SIZE,
        HEAD_SIZE,
    )
    for _ in range(0, kept, ROWS):
        tl.debug_barrier()  # every warp has read its part of the tile
        next_tile = _load_kept(
            x_ptr,
            targets + ROWS,
            kept,
            columns,
            indices_ptr,
            start_ptr,
            block_table_ptr,
            stride_page,
            stride_row,
            PAGE_SIZE,
            HEAD_SIZE,
        )
        mask = targets < kept
        rows = _rows_of(
            targets, mask, start_ptr, block_table_ptr, stride_page, stride_row, PAGE_SIZE
        )
        mask_x = mask[:, None] & (columns < HEAD_SIZE)[None, :]
        tl.store(x_ptr + rows[:, None] + columns[None, :], tile, mask=mask_x)
        targets += ROWS
        tile = next_tile


@triton.jit(
    do_not_specialize=["num_kv_heads", "max_blocks"], do_not_specialize_on_alignment=INTEGERS
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
    if block_table_ptr is not None:
        block_table_ptr += seq * max_blocks
    if column < SLICES_K:
        _move_to_front(
            k_ptr + head * stride_k_head,
            kept,
            column * COLUMNS_K + tl.arange(0, COLUMNS_K),
            indices_ptr + first,
            cu_seqlens_k_ptr + seq,
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
            cu_seqlens_k_ptr + seq,
            block_table_ptr,
            stride_v_page,
            stride_v_row,
            PAGE_SIZE,
            HEAD_SIZE_V,
            ROWS,
        )
