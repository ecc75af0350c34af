"""Move the kept rows of K and V together: into a ragged pool, or to the front in place."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .checks import (
    expect,
    expect_float,
    expect_int32,
    expect_paged_or_packed,
    expect_same_device,
)
from .compact_kernels import _compact_in_place_kernel, _compact_kernel

TILE_BYTES = 8192  # of K, and as many of V: 32 registers a thread, so that many programs fit
ROWS_IN_PLACE = 256  # of a tile of columns: 16 KiB, as only so many programs can run at once
COLUMN_BYTES = 64  # what memory hands out at a time


def tile_rows(head_size: int, itemsize: int) -> int:
    """Rows of a tile out of place: as many as fill TILE_BYTES, for heads of any size."""
    return max(TILE_BYTES // (triton.next_power_of_2(head_size) * itemsize), 1)


def compact_kv(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    indices: Tensor,
    cu_kept: Tensor,
    out_k: Tensor,
    out_v: Tensor,
    cu_seqlens_out: Tensor,
    *,
    max_kept: int,
    block_table: Tensor | None = None,
    out_block_table: Tensor | None = None,
) -> None:
    """Move the kept rows of one layer's K and V to the front of their segments of a ragged pool.

    Segment s = (sequence, KV head) of the sources becomes varlen sequence s of the pool. Rows of
    the pool behind a segment's kept rows (its head room) are not written.

    Args:
        k, v: `[total_k, num_kv_heads, d]` (`d_v` for v), or pages
            `[num_blocks, page_size, num_kv_heads, d]`; any strides whose last is 1.
        cu_seqlens_k: `[num_seqs + 1]` int32, whose starts alone are used; unused for pages.
        indices, cu_kept: this layer's part of a Selection: cu_kept is
            `[num_seqs * num_kv_heads + 1]` int32 and may start above 0.
        out_k, out_v: `[capacity, 1, d]`, or pages `[num_blocks, page_size, 1, d]`; must not
            overlap the sources (see compact_kv_).
        cu_seqlens_out: `[num_seqs * num_kv_heads + 1]` int32, segment starts; unused for pages.
        max_kept: host upper bound of the kept tokens of a segment.
        block_table: `[num_seqs, max_blocks]` int32, pages of the sources.
        out_block_table: `[num_seqs * num_kv_heads, max_blocks]` int32, pages of the pool.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: a dtype that is not fp16, bf16 or fp32.
    """
    num_segments = validate_selection(k, v, cu_seqlens_k, indices, cu_kept, block_table)
    expect_same_device(
        k=k,
        out_k=out_k,
        out_v=out_v,
        cu_seqlens_out=cu_seqlens_out,
        out_block_table=out_block_table,
    )
    for name, source, out in (("out_k", k, out_k), ("out_v", v, out_v)):
        expect_paged_or_packed(name, out, out_block_table is not None)
        expect_float(name, out)
        expect(out.dtype == source.dtype, name, f"dtype {out.dtype}", f"{source.dtype}")
        shape = (1, source.shape[-1])
        expect(tuple(out.shape[-2:]) == shape, name, f"shape {tuple(out.shape)}", f"(..., {shape})")
    same = out_k.shape[:-1] == out_v.shape[:-1]
    got, expected = f"shape {tuple(out_v.shape)}", f"({tuple(out_k.shape[:-1])}, d_v), as out_k"
    expect(same, "out_v", got, expected)
    if out_block_table is None:
        expect_int32("cu_seqlens_out", cu_seqlens_out, (num_segments + 1,))
    else:
        shape = (num_segments, out_block_table.shape[-1])
        expect_int32("out_block_table", out_block_table, shape)
    if num_segments == 0 or max_kept <= 0:
        return
    widest = max(k.shape[-1], v.shape[-1])
    rows = tile_rows(widest, max(k.element_size(), v.element_size()))
    with torch.cuda.device_of(k):  # the model may lie on several devices
        _compact_kernel[(num_segments, triton.cdiv(max_kept, rows))](
            **source_arguments(k, v, cu_seqlens_k, indices, cu_kept, block_table),
            out_k_ptr=out_k,
            out_v_ptr=out_v,
            cu_seqlens_out_ptr=cu_seqlens_out,
            out_block_table_ptr=out_block_table,
            out_max_blocks=0 if out_block_table is None else out_block_table.shape[1],
            stride_out_k_page=0 if out_block_table is None else out_k.stride(0),
            stride_out_k_row=out_k.stride(-3),
            stride_out_v_page=0 if out_block_table is None else out_v.stride(0),
            stride_out_v_row=out_v.stride(-3),
            OUT_PAGE_SIZE=1 if out_block_table is None else out_k.shape[1],
            D=triton.next_power_of_2(widest),
            ROWS=rows,
            num_warps=4,
        )


def compact_kv_(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    indices: Tensor,
    cu_kept: Tensor,
    *,
    max_kept: int,
    block_table: Tensor | None = None,
) -> None:
    """Move the kept rows to the front of their own sequence, in place, each KV head on its own.

    Arguments as for compact_kv. After it, logical row j of (sequence i, KV head h) holds kept
    token j of segment i * num_kv_heads + h; rows behind are unchanged. Needs no second copy.

    Cost: a program walks a whole segment, as a tile may only move when those before it have. So
    K and V and their columns, 64 bytes each, go to programs of their own.
    """
    num_segments = validate_selection(k, v, cu_seqlens_k, indices, cu_kept, block_table)
    if num_segments == 0 or max_kept <= 0:
        return
    columns_k, columns_v = (COLUMN_BYTES // x.element_size() for x in (k, v))
    slices_k = triton.cdiv(k.shape[-1], columns_k)
    slices_v = triton.cdiv(v.shape[-1], columns_v)
    with torch.cuda.device_of(k):  # the model may lie on several devices
        _compact_in_place_kernel[(num_segments, slices_k + slices_v)](
            **source_arguments(k, v, cu_seqlens_k, indices, cu_kept, block_table),
            COLUMNS_K=columns_k,
            COLUMNS_V=columns_v,
            ROWS=ROWS_IN_PLACE,
            num_warps=8,
        )


def source_arguments(k, v, cu_seqlens_k, indices, cu_kept, block_table) -> dict[str, object]:
    """What every kernel that reads rows by a selection is launched with."""
    paged = block_table is not None
    return {
        "k_ptr": k,
        "v_ptr": v,
        "cu_seqlens_k_ptr": cu_seqlens_k,
        "indices_ptr": indices,
        "cu_kept_ptr": cu_kept,
        "block_table_ptr": block_table,
        "num_kv_heads": k.shape[-2],
        "max_blocks": block_table.shape[1] if paged else 0,
        "stride_k_page": k.stride(0) if paged else 0,
        "stride_k_row": k.stride(-3),
        "stride_k_head": k.stride(-2),
        "stride_v_page": v.stride(0) if paged else 0,
        "stride_v_row": v.stride(-3),
        "stride_v_head": v.stride(-2),
        "PAGE_SIZE": k.shape[1] if paged else 1,
        "HEAD_SIZE": k.shape[-1],
        "HEAD_SIZE_V": v.shape[-1],
    }


def validate_selection(k, v, cu_seqlens_k, indices, cu_kept, block_table) -> int:
    """Refuse sources and a selection that do not fit each other; the number of segments."""
    expect_same_device(
        k=k,
        v=v,
        cu_seqlens_k=cu_seqlens_k,
        indices=indices,
        cu_kept=cu_kept,
        block_table=block_table,
    )
    for name, x in (("k", k), ("v", v)):
        expect_paged_or_packed(name, x, block_table is not None)
        expect_float(name, x)
    same = k.shape[:-1] == v.shape[:-1]
    expect(same, "v", f"shape {tuple(v.shape)}", f"({tuple(k.shape[:-1])}, d_v), as k")
    num_seqs = cu_seqlens_k.numel() - 1 if block_table is None else block_table.shape[0]
    if block_table is None:
        expect(num_seqs >= 0, "cu_seqlens_k", "no elements", "num_seqs + 1 elements")
        expect_int32("cu_seqlens_k", cu_seqlens_k, (num_seqs + 1,))
    else:
        expect_int32("block_table", block_table, (num_seqs, block_table.shape[-1]))
    num_segments = num_seqs * k.shape[-2]
    expect_int32("indices", indices, (indices.numel(),))
    expect_int32("cu_kept", cu_kept, (num_segments + 1,))
    return num_segments
