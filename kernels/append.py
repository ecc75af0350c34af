"""Write a step's K and V behind the live rows of each sequence, and advance the lengths."""

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


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor,
    *,
    block_table: Tensor | None = None,
) -> None:
    """Append n rows to every sequence, in one launch, without the host learning any length.

    A row without room (at its segment's end, or past its block table) is dropped, and its length
    still advances: the host sees to room before the step.

    Args:
        k, v: `[num_seqs, n, num_kv_heads, d]` (`d_v` for v), of the caches' dtype.
        k_cache, v_cache: `[total_k, num_kv_heads, d]`, or pages
            `[num_blocks, page_size, num_kv_heads, d]`; written in place.
        cu_seqlens_k: `[num_seqs + 1]` int32, segment starts, head room included; unused for pages.
        seqused_k: `[num_seqs]` int32, live rows; advanced by n in place.
        block_table: `[num_seqs, max_blocks]` int32.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: a dtype that is not fp16, bf16 or fp32.
    """
    expect_same_device(
        k=k,
        v=v,
        k_cache=k_cache,
        v_cache=v_cache,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
    )
    layout = "[num_seqs, n, num_kv_heads, d]"
    expect(k.dim() == 4, "k", f"shape {tuple(k.shape)}", layout)
    num_seqs, n, num_kv_heads, d = k.shape
    shape_v = (num_seqs, n, num_kv_heads, v.shape[-1])
    expect(tuple(v.shape) == shape_v, "v", f"shape {tuple(v.shape)}", f"{shape_v}")
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        expect_float(name, x)
        expect_paged_or_packed(f"{name}_cache", cache, block_table is not None)
        expect_float(f"{name}_cache", cache)
        expect(cache.dtype == x.dtype, f"{name}_cache", f"dtype {cache.dtype}", f"{x.dtype}")
        same = tuple(cache.shape[-2:]) == tuple(x.shape[-2:])
        expect(same, f"{name}_cache", f"shape {tuple(cache.shape)}", f"(..., {x.shape[-2:]})")
    same = k_cache.shape[:-1] == v_cache.shape[:-1]
    got, expected = (
        f"shape {tuple(v_cache.shape)}",
        f"({tuple(k_cache.shape[:-1])}, d_v), as k_cache",
    )
    expect(same, "v_cache", got, expected)
    expect_int32("seqused_k", seqused_k, (num_seqs,))
    expect_int32("cu_seqlens_k", cu_seqlens_k, (num_seqs + 1,))
    if block_table is not None:
        expect_int32("block_table", block_table, (num_seqs, block_table.shape[-1]))

    d_v = v.shape[-1]
    with torch.cuda.device_of(k):  # the model may lie on several devices
        _append_kernel[(num_seqs,)](
            k_ptr=k,
            v_ptr=v,
            k_cache_ptr=k_cache,
            v_cache_ptr=v_cache,
            cu_seqlens_k_ptr=cu_seqlens_k,
            seqused_k_ptr=seqused_k,
            block_table_ptr=block_table,
            n=n,
            num_kv_heads=num_kv_heads,
            max_blocks=0 if block_table is None else block_table.shape[1],
            stride_k_seq=k.stride(0),
            stride_k_row=k.stride(1),
            stride_k_head=k.stride(2),
            stride_v_seq=v.stride(0),
            stride_v_row=v.stride(1),
            stride_v_head=v.stride(2),
            stride_k_cache_page=0 if block_table is None else k_cache.stride(0),
            stride_k_cache_row=k_cache.stride(-3),
            stride_k_cache_head=k_cache.stride(-2),
            stride_v_cache_page=0 if block_table is None else v_cache.stride(0),
            stride_v_cache_row=v_cache.stride(-3),
            stride_v_cache_head=v_cache.stride(-2),
            PAGE_SIZE=1 if block_table is None else k_cache.shape[1],
            HEAD_SIZE=d,
            HEAD_SIZE_V=d_v,
            D=padded(max(d, d_v)),
            BLOCK=16 if n * num_kv_heads <= 16 else 32,
            num_warps=4,
        )


@triton.jit(
    do_not_specialize=["n", "num_kv_heads", "max_blocks"],
    do_not_specialize_on_alignment=["cu_seqlens_k_ptr", "seqused_k_ptr"],  # single elements
)
def _append_kernel(
    k_ptr,  # [num_seqs, n, num_kv_heads, d]
    v_ptr,  # [num_seqs, n, num_kv_heads, d_v]
    k_cache_ptr,  # [total_k, num_kv_heads, d] or pages
    v_cache_ptr,
    cu_seqlens_k_ptr,
    seqused_k_ptr,
    block_table_ptr,
    n,
    num_kv_heads,
    max_blocks,
    stride_k_seq,
    stride_k_row,
    stride_k_head,
    stride_v_seq,
    stride_v_row,
    stride_v_head,
    stride_k_cache_page,
    stride_k_cache_row,
    stride_k_cache_head,
    stride_v_cache_page,
    stride_v_cache_row,
    stride_v_cache_head,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All new rows of one sequence; the one program that reads its length also advances it."""
    seq = tl.program_id(0).to(tl.int64)
    used = tl.load(seqused_k_ptr + seq)
    dims = tl.arange(0, D)
    # Rows of all heads in one run, so that single rows of many heads still fill a tile.
    for start in range(0, n * num_kv_heads, BLOCK):
        items = start + tl.arange(0, BLOCK)
        rows, heads = (items // num_kv_heads).to(tl.int64), (items % num_kv_heads).to(tl.int64)
        positions = used + items // num_kv_heads
        fits = (items < n * num_kv_heads) & (positions >= 0)
        if block_table_ptr is None:
            first = tl.load(cu_seqlens_k_ptr + seq)
            fits = fits & (positions < tl.load(cu_seqlens_k_ptr + seq + 1) - first)
            target_k = (first + positions).to(tl.int64) * stride_k_cache_row
            target_v = (first + positions).to(tl.int64) * stride_v_cache_row
        else:
            fits = fits & (positions < max_blocks * PAGE_SIZE)
            table = block_table_ptr + seq * max_blocks
            page = tl.load(table + positions // PAGE_SIZE, mask=fits, other=0).to(tl.int64)
            slot = (positions % PAGE_SIZE).to(tl.int64)
            target_k = page * stride_k_cache_page + slot * stride_k_cache_row
            target_v = page * stride_v_cache_page + slot * stride_v_cache_row
        mask_k = fits[:, None] & (dims < HEAD_SIZE)[None, :]
        source_k = seq * stride_k_seq + rows * stride_k_row + heads * stride_k_head
        k = tl.load(k_ptr + source_k[:, None] + dims[None, :], mask=mask_k)
        target_k += heads * stride_k_cache_head
        tl.store(k_cache_ptr + target_k[:, None] + dims[None, :], k, mask=mask_k)
        mask_v = fits[:, None] & (dims < HEAD_SIZE_V)[None, :]
        source_v = seq * stride_v_seq + rows * stride_v_row + heads * stride_v_head
        v = tl.load(v_ptr + source_v[:, None] + dims[None, :], mask=mask_v)
        target_v += heads * stride_v_cache_head
        tl.store(v_cache_ptr + target_v[:, None] + dims[None, :], v, mask=mask_v)
    tl.debug_barrier()  # every warp has read the length that one of them now overwrites
    tl.store(seqused_k_ptr + seq, used + n)
