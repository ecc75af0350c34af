"""One row for what is evicted: sums of the rows that a selection leaves out, stored as their mean.

With the logarithm of their number as the first key's bias in `varlen_decode`, the mean row stands
for all of them. Compaction reads the kept rows and this the others, so that each row of K and V is
read once. Nothing adds floats atomically: the sums of a sequence are the same on every run, and
whatever other sequences there are.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .checks import (
    FP8,
    expect,
    expect_array,
    expect_descale,
    expect_per_sequence,
    expect_same_device,
    expect_starts,
)
from .compact import check_pool, check_selection, source_constants
from .launch import Launch, current, fp32_tile, once_per_signature
from .remainder_kernels import _store_means_kernel, _sum_evicted_kernel

CHUNK = 256  # rows that one program adds up, so that one long prompt fills the GPU
SUMS_BYTES = 8192  # of the sums that a program has for K, and as many for V


def num_chunks(max_seqlen_k: int) -> int:
    """Partial sums of a segment: one at least."""
    return max(triton.cdiv(max_seqlen_k, CHUNK), 1)


def sum_evicted(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor | None,
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
            with pages, and nothing with both, where it may be None.
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
    launch = _prepare_sums(
        *(k, v, cu_seqlens_k, indices, cu_kept, seqused_k, block_table), max_seqlen_k=max_seqlen_k
    )
    num_segments, chunks = launch["grid"]
    sum_k, sum_v = (
        k.new_empty(num_segments, chunks, x.shape[-1], dtype=torch.float32) for x in (k, v)
    )
    if num_segments == 0:
        return sum_k, sum_v
    with current(k.device):
        _sum_evicted_kernel.run(
            **launch,
            k_ptr=k,
            v_ptr=v,
            cu_seqlens_k_ptr=cu_seqlens_k,
            indices_ptr=indices,
            cu_kept_ptr=cu_kept,
            block_table_ptr=block_table,
            seqused_k_ptr=seqused_k,
            sum_k_ptr=sum_k,
            sum_v_ptr=sum_v,
        )
    return sum_k, sum_v


@once_per_signature
def _prepare_sums(
    k, v, cu_seqlens_k, indices, cu_kept, seqused_k, block_table, *, max_seqlen_k: int
) -> Launch:
    num_segments = check_selection(k, v, cu_seqlens_k, indices, cu_kept, block_table)
    num_seqs = num_segments // k.shape[-2]
    if seqused_k is not None:
        expect_same_device(k=k, seqused_k=seqused_k)
        expect_per_sequence(num_seqs, seqused_k=seqused_k)
    else:
        expect_starts("cu_seqlens_k", cu_seqlens_k, block_table=block_table, seqused_k=seqused_k)
        expect_per_sequence(num_seqs, cu_seqlens_k=cu_seqlens_k)
    constants = {
        **source_constants(k, v, block_table),
        **fp32_tile(max(k.shape[-1], v.shape[-1]), SUMS_BYTES),
        "CHUNK": CHUNK,
        "num_warps": 4,
    }
    return Launch((num_segments, num_chunks(max_seqlen_k)), constants)


def store_means(
    sum_k: Tensor,
    sum_v: Tensor,
    counts: Tensor,
    out_k: Tensor,
    out_v: Tensor,
    cu_seqlens_out: Tensor | None,
    *,
    out_block_table: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """Write the mean of what was evicted as the first row of each segment of a ragged pool.

    A segment whose count is 0 evicted nothing, and is left as it is.

    Args:
        sum_k, sum_v: `[num_segments, n, d]` (`d_v` for v) fp32, as `sum_evicted` gives them.
        counts: `[num_segments]` int32, how many rows were added up.
        out_k, out_v: `[capacity, 1, d]`, or pages `[num_blocks, page_size, 1, d]`.
        cu_seqlens_out: `[num_segments + 1]` int32, whose starts alone are used; unused for
            pages, where it may be None.
        out_block_table: `[num_segments, max_blocks]` int32, pages of the pool.
        k_descale, v_descale: `[num_segments, 1]` fp32 with an fp8 (e4m3) pool, as for compact_kv.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: a dtype that is not fp16, bf16, fp32 or fp8 (e4m3), and fp8 on a GPU
            of compute capability below 8.9.
    """
    launch = _prepare_means(
        *(sum_k, sum_v, counts, out_k, out_v, cu_seqlens_out, out_block_table),
        *(k_descale, v_descale),
    )
    if launch["grid"][0] == 0:
        return
    with current(out_k.device):
        _store_means_kernel.run(
            **launch,
            sum_k_ptr=sum_k,
            sum_v_ptr=sum_v,
            counts_ptr=counts,
            out_k_ptr=out_k,
            out_v_ptr=out_v,
            cu_seqlens_out_ptr=cu_seqlens_out,
            out_block_table_ptr=out_block_table,
            k_descale_ptr=k_descale,
            v_descale_ptr=v_descale,
        )


@once_per_signature
def _prepare_means(
    sum_k, sum_v, counts, out_k, out_v, cu_seqlens_out, out_block_table, k_descale, v_descale
) -> Launch:
    expect(sum_k.dim() == 3, "sum_k", f"shape {tuple(sum_k.shape)}", "[num_segments, n, d]")
    num_segments, num_sums, d = sum_k.shape
    d_v = sum_v.shape[-1]
    for name, x in (("sum_k", sum_k), ("sum_v", sum_v)):
        expect_array(name, x, (*sum_k.shape[:2], x.shape[-1]), torch.float32)
    check_pool(num_segments, sum_k, sum_v, out_k, out_v, cu_seqlens_out, out_block_table)
    expect_same_device(sum_k=sum_k, counts=counts, k_descale=k_descale, v_descale=v_descale)
    for name, out, descale in (("k_descale", out_k, k_descale), ("v_descale", out_v, v_descale)):
        expect_descale(name, descale, out.dtype == FP8, (num_segments, 1))
    expect_per_sequence(num_segments, counts=counts)
    constants = {
        "num_sums": num_sums,
        "out_max_blocks": 0 if out_block_table is None else out_block_table.shape[1],
        "stride_out_k": out_k.stride(0),  # of a page, or of a row
        "stride_out_v": out_v.stride(0),
        "HEAD_SIZE": d,
        "HEAD_SIZE_V": d_v,
        **fp32_tile(max(d, d_v), SUMS_BYTES),
        "num_warps": 4,
    }
    return Launch((num_segments,), constants)
