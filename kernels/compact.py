"""Move the kept rows of K and V together: into a ragged pool, or to the front in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .checks import (
    FP8,
    expect,
    expect_array,
    expect_descale,
    expect_dtype,
    expect_like,
    expect_per_sequence,
    expect_rows,
    expect_same_device,
    expect_starts,
    interpreted,
)
from .compact_kernels import _compact_in_place_kernel, _compact_kernel
from .launch import (
    Launch,
    cache_constants,
    current,
    num_multiprocessors,
    once_per_signature,
    to_device,
)

TILE_BYTES = 8192  # of K, and as many of V: 32 registers a thread, so that many programs fit
IN_PLACE_BYTES = 32768  # of a tile in place, as only so many programs can run at once
COLUMN_BYTES = (64, 32)  # of a program in place: what memory hands out at a time, and the L2 cache
MAX_GRID = 65535  # of every axis but the first


def tile_rows(head_size: int, itemsize: int) -> int:
    """Rows of a tile out of place: as many as fill TILE_BYTES, for heads of any size."""
    return max(TILE_BYTES // (triton.next_power_of_2(head_size) * itemsize), 1)


def compact_kv(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor | None,
    indices: Tensor,
    cu_kept: Tensor,
    out_k: Tensor,
    out_v: Tensor,
    cu_seqlens_out: Tensor | None,
    *,
    max_kept: int,
    block_table: Tensor | None = None,
    out_block_table: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """Move the kept rows of one layer's K and V to the front of their segments of a ragged pool.

    Segment s = (sequence, KV head) of the sources becomes varlen sequence s of the pool. Rows of
    the pool behind a segment's kept rows (its head room) are not written.

    Args:
        k, v: `[total_k, num_kv_heads, d]` (`d_v` for v), or pages
            `[num_blocks, page_size, num_kv_heads, d]`; any strides whose last is 1.
        cu_seqlens_k: `[num_seqs + 1]` int32, whose starts alone are used; unused for pages, where
            it may be None.
        indices, cu_kept: this layer's part of a Selection: cu_kept is
            `[num_seqs * num_kv_heads + 1]` int32 and may start above 0.
        out_k, out_v: `[capacity, 1, d]`, or pages `[num_blocks, page_size, 1, d]`, of the sources'
            dtype or fp8 (e4m3); must not overlap the sources (see compact_kv_).
        cu_seqlens_out: `[num_seqs * num_kv_heads + 1]` int32, segment starts; unused for
            pages, where it may be None.
        max_kept: host upper bound of the kept tokens of a segment.
        block_table: `[num_seqs, max_blocks]` int32, pages of the sources.
        out_block_table: `[num_seqs * num_kv_heads, max_blocks]` int32, pages of the pool.
        k_descale, v_descale: `[num_seqs * num_kv_heads, 1]` fp32, such as `kept_descales` makes
            them, where rows become fp8: the stored value times it is the row; the nearest, ties to
            even, and at most 448 times it. Sources that are fp8 already move as they are.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: a dtype that is not fp16, bf16, fp32 or fp8 (e4m3), and fp8 on a GPU
            of compute capability below 8.9.
    """
    launch = _prepare(
        k,
        v,
        cu_seqlens_k,
        indices,
        cu_kept,
        out_k,
        out_v,
        cu_seqlens_out,
        block_table,
        out_block_table,
        k_descale,
        v_descale,
        max_kept=max_kept,
    )
    if launch["grid"][0] == 0 or max_kept <= 0:
        return
    with current(k.device):
        _compact_kernel.run(
            **launch,
            k_ptr=k,
            v_ptr=v,
            layers_ptr=None,
            cu_seqlens_k_ptr=cu_seqlens_k,
            indices_ptr=indices,
            cu_kept_ptr=cu_kept,
            block_table_ptr=block_table,
            out_k_ptr=out_k,
            out_v_ptr=out_v,
            cu_seqlens_out_ptr=cu_seqlens_out,
            out_block_table_ptr=out_block_table,
            k_descale_ptr=k_descale,
            v_descale_ptr=v_descale,
        )


@once_per_signature
def _prepare(
    k,
    v,
    cu_seqlens_k,
    indices,
    cu_kept,
    out_k,
    out_v,
    cu_seqlens_out,
    block_table,
    out_block_table,
    k_descale,
    v_descale,
    *,
    max_kept: int,
) -> Launch:
    num_segments = check_selection(k, v, cu_seqlens_k, indices, cu_kept, block_table, or_fp8=True)
    check_pool(num_segments, k, v, out_k, out_v, cu_seqlens_out, out_block_table)
    check_descales(num_segments, k, v, out_k, out_v, k_descale, v_descale)
    launch = moving_launch(k, v, block_table, num_segments, max_kept)
    launch |= {
        "out_max_blocks": 0 if out_block_table is None else out_block_table.shape[1],
        "stride_out_k_page": 0 if out_block_table is None else out_k.stride(0),
        "stride_out_k_row": out_k.stride(-3),
        "stride_out_v_page": 0 if out_block_table is None else out_v.stride(0),
        "stride_out_v_row": out_v.stride(-3),
        "OUT_PAGE_SIZE": 1 if out_block_table is None else out_k.shape[1],
    }
    return launch


def moving_launch(k, v, block_table, num_segments: int, max_kept: int) -> Launch:
    """Of a kernel that goes over the kept rows of every segment, a tile a program."""
    widest = max(k.shape[-1], v.shape[-1])
    rows = tile_rows(widest, max(k.element_size(), v.element_size()))
    constants = {
        **source_constants(k, v, block_table),
        "num_segments": num_segments,
        "D": triton.next_power_of_2(widest),
        "ROWS": rows,
        "ALIGNED": False,  # of addresses, which are none here
        "num_warps": 4,
    }
    tiles = max(triton.cdiv(max_kept, rows), 1)
    shared = triton.cdiv(tiles, MAX_GRID)  # evenly, by as many programs along the third axis
    return Launch((num_segments, triton.cdiv(tiles, shared), shared), constants)


def compact_layers(
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    cu_seqlens_k: Tensor,
    indices: Tensor,
    cu_kept: Tensor,
    out_k: Tensor,
    out_v: Tensor,
    cu_seqlens_out: Tensor,
    *,
    max_kept: int,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """compact_kv of several layers into one pool, in one launch for all of the same strides.

    Args:
        k, v: for each layer `[total_k, num_kv_heads, d]` (`d_v` for v), of one shape.
        cu_seqlens_k, indices, out_k, out_v: as for compact_kv, without pages.
        cu_kept: `[num_layers * num_seqs * num_kv_heads + 1]` int32, by layer, sequence, KV head.
        cu_seqlens_out: `[num_layers, num_seqs * num_kv_heads + 1]` int32.
        max_kept: host upper bound of the kept tokens of a segment, of any layer.
        k_descale, v_descale: `[num_layers, num_seqs * num_kv_heads, 1]` fp32, as for compact_kv.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: as compact_kv.
    """
    num_layers = len(k)
    check_layers(k, v)
    if num_layers == 0:
        return
    num_segments = (cu_seqlens_k.numel() - 1) * k[0].shape[-2]
    expect_array("cu_kept", cu_kept, (num_layers * num_segments + 1,))
    expect_array("cu_seqlens_out", cu_seqlens_out, (num_layers, num_segments + 1))
    for name, x in (("k_descale", k_descale), ("v_descale", v_descale)):
        expect_descale(name, x, x is not None, (num_layers, num_segments, 1))
    first_k, first_v = (None if x is None else x[0] for x in (k_descale, v_descale))
    if num_layers == 1:
        return compact_kv(
            *(k[0], v[0], cu_seqlens_k, indices, cu_kept, out_k, out_v, cu_seqlens_out[0]),
            max_kept=max_kept,
            k_descale=first_k,
            v_descale=first_v,
        )
    for like, layers, aligned in layers_alike(k, v):
        launch = _prepare(
            k[like],
            v[like],
            cu_seqlens_k,
            indices,
            cu_kept[: num_segments + 1],
            out_k,
            out_v,
            cu_seqlens_out[0],
            None,
            None,
            first_k,
            first_v,
            max_kept=max_kept,
        )
        if num_segments == 0 or max_kept <= 0:
            return
        with current(out_k.device):
            _compact_kernel.run(
                **of_layers(launch, len(layers), num_segments, aligned),
                k_ptr=k[like],
                v_ptr=v[like],
                layers_ptr=layers,
                cu_seqlens_k_ptr=cu_seqlens_k,
                indices_ptr=indices,
                cu_kept_ptr=cu_kept,
                block_table_ptr=None,
                out_k_ptr=out_k,
                out_v_ptr=out_v,
                cu_seqlens_out_ptr=cu_seqlens_out,
                out_block_table_ptr=None,
                k_descale_ptr=k_descale,
                v_descale_ptr=v_descale,
            )


def check_layers(k: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """Refuse layers of unequal shape, dtype or device, and rows that do not lie in one piece."""
    expect(len(v) == len(k), "v", f"{len(v)} layers", f"{len(k)}, as k")
    for name, layers in (("k", k), ("v", v)):
        for i, x in enumerate(layers):
            expect_like(f"{name}[{i}]", x, layers[0])
            unit = x.stride()[-1:] == (1,)
            expect(unit, f"{name}[{i}]", f"strides {x.stride()}", "1 in the last dimension")


def layers_alike(k: Sequence[Tensor], v: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, bool]]:
    """Layers that one launch can do: the number of one of them, for its strides; of each, the
    number and the addresses of its k and v, `[layers, 3]` int64 on their device; and whether these
    are aligned."""
    on_gpu = interpreted() and k[0].is_cuda
    expect(not on_gpu, "k", "addresses of a GPU", "the CPU's, where Triton interprets")
    alike: dict[tuple, list[tuple[int, int, int]]] = {}
    for i, pair in enumerate(zip(k, v, strict=True)):
        addresses = pair[0].data_ptr(), pair[1].data_ptr()
        aligned = addresses[0] % 16 == addresses[1] % 16 == 0
        table = alike.setdefault((pair[0].stride(), pair[1].stride(), aligned), [])
        table.append((i, *addresses))
    for (_, _, aligned), table in alike.items():
        yield table[0][0], to_device(torch.tensor(table), k[0].device), aligned


def of_layers(launch: Launch, num_layers: int, num_segments: int, aligned: bool) -> dict[str, Any]:
    """A layer's launch, for so many at once."""
    grid = (num_layers * num_segments, *launch["grid"][1:])
    return launch | {"grid": grid, "ALIGNED": aligned}


def compact_kv_(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor | None,
    indices: Tensor,
    cu_kept: Tensor,
    *,
    max_kept: int,
    block_table: Tensor | None = None,
) -> None:
    """Move the kept rows to the front of their own sequence, in place, each KV head on its own.

    Arguments as for compact_kv. After it, logical row j of (sequence i, KV head h) holds kept
    token j of segment i * num_kv_heads + h; rows behind are unchanged. Needs no second copy.

    For engines whose caches get shorter where they are: no adapter of ours calls it.

    Cost: a program walks a whole segment, as a tile may only move when those before it have. So
    K and V and their columns, 64 bytes each, go to programs of their own; 32 where these are fewer
    than multiprocessors, as at batch 1.
    """
    launch = _prepare_in_place(
        *(k, v, cu_seqlens_k, indices, cu_kept, block_table),
        multiprocessors=num_multiprocessors(k.device),
    )
    if launch["grid"][0] == 0 or max_kept <= 0:
        return
    with current(k.device):
        _compact_in_place_kernel.run(
            **launch,
            k_ptr=k,
            v_ptr=v,
            cu_seqlens_k_ptr=cu_seqlens_k,
            indices_ptr=indices,
            cu_kept_ptr=cu_kept,
            block_table_ptr=block_table,
        )


@once_per_signature
def _prepare_in_place(
    k, v, cu_seqlens_k, indices, cu_kept, block_table, *, multiprocessors: int
) -> Launch:
    num_segments = check_selection(k, v, cu_seqlens_k, indices, cu_kept, block_table)
    for column_bytes in COLUMN_BYTES:
        columns_k, columns_v = (column_bytes // x.element_size() for x in (k, v))
        slices_k = triton.cdiv(k.shape[-1], columns_k)
        slices_v = triton.cdiv(v.shape[-1], columns_v)
        if num_segments * (slices_k + slices_v) >= multiprocessors:
            break
    constants = {
        **source_constants(k, v, block_table),
        "COLUMNS_K": columns_k,
        "COLUMNS_V": columns_v,
        "ROWS": IN_PLACE_BYTES // column_bytes,
        "num_warps": 8,
    }
    return Launch((num_segments, slices_k + slices_v), constants)


def source_constants(k, v, block_table) -> dict[str, Any]:
    """What every kernel that reads rows by a selection is launched with, beside the tensors."""
    return {
        **cache_constants(block_table, k=k, v=v),
        "num_kv_heads": k.shape[-2],
        "HEAD_SIZE": k.shape[-1],
        "HEAD_SIZE_V": v.shape[-1],
    }


def check_selection(
    k, v, cu_seqlens_k, indices, cu_kept, block_table, *, or_fp8: bool = False
) -> int:
    """Refuse sources and a selection that do not fit each other; the number of segments."""
    expect_same_device(
        k=k,
        v=v,
        cu_seqlens_k=cu_seqlens_k,
        indices=indices,
        cu_kept=cu_kept,
        block_table=block_table,
    )
    expect_rows(block_table, or_fp8=or_fp8, k=k, v=v)
    expect_starts("cu_seqlens_k", cu_seqlens_k, block_table=block_table)
    if block_table is None:
        num_seqs = cu_seqlens_k.numel() - 1
        expect(num_seqs >= 0, "cu_seqlens_k", "no elements", "num_seqs + 1 elements")
        expect_per_sequence(num_seqs, cu_seqlens_k=cu_seqlens_k)
    else:
        num_seqs = block_table.shape[0]
        expect_per_sequence(num_seqs, block_table=block_table)
    num_segments = num_seqs * k.shape[-2]
    expect_array("indices", indices, (indices.numel(),))
    expect_per_sequence(num_segments, cu_kept=cu_kept)
    return num_segments


def check_pool(num_segments, k, v, out_k, out_v, cu_seqlens_out, out_block_table) -> None:
    """Refuse a ragged pool that does not fit the segments, or rows as wide as those of k and v."""
    expect_same_device(
        k=k,
        v=v,
        out_k=out_k,
        out_v=out_v,
        cu_seqlens_out=cu_seqlens_out,
        out_block_table=out_block_table,
    )
    for name, source, out in (("out_k", k, out_k), ("out_v", v, out_v)):
        shape = (1, source.shape[-1])
        expect(tuple(out.shape[-2:]) == shape, name, f"shape {tuple(out.shape)}", f"(..., {shape})")
    expect_rows(out_block_table, or_fp8=True, out_k=out_k, out_v=out_v)
    expect_starts("cu_seqlens_out", cu_seqlens_out, out_block_table=out_block_table)
    if out_block_table is None:
        expect_per_sequence(num_segments, cu_seqlens_out=cu_seqlens_out)
    else:
        expect_per_sequence(num_segments, out_block_table=out_block_table)


def check_descales(num_segments, k, v, out_k, out_v, k_descale, v_descale) -> None:
    """Refuse a pool of another dtype, but fp8 with the scales of its segments."""
    expect_same_device(out_k=out_k, k_descale=k_descale, v_descale=v_descale)
    for name, source, out, descale in (("k", k, out_k, k_descale), ("v", v, out_v, v_descale)):
        is_scaled = out.dtype == FP8 and source.dtype != FP8
        if not is_scaled:
            expect_dtype(f"out_{name}", out, source.dtype)
        expect_descale(f"{name}_descale", descale, is_scaled, (num_segments, 1))
