"""Write a step's K and V behind the live rows of each sequence, and advance the lengths."""

from __future__ import annotations

from torch import Tensor

from .append_kernels import _append_kernel
from .checks import (
    FP8,
    expect,
    expect_descale,
    expect_dtype,
    expect_float,
    expect_per_sequence,
    expect_rows,
    expect_same_device,
    expect_shape,
    expect_starts,
)
from .launch import Launch, cache_constants, current, once_per_signature, padded


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor,
    *,
    block_table: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """Append n rows to every sequence, in one launch, without the host learning any length.

    A row without room (at its segment's end, or past its block table) is dropped, and its length
    still advances: the host sees to room before the step. Where it did not, a length above the
    segment's capacity tells.

    Args:
        k, v: `[num_seqs, n, num_kv_heads, d]` (`d_v` for v), of the caches' dtype unless these are
            fp8.
        k_cache, v_cache: `[total_k, num_kv_heads, d]`, or pages
            `[num_blocks, page_size, num_kv_heads, d]`; written in place.
        cu_seqlens_k: `[num_seqs + 1]` int32, segment starts, head room included; unused for
            pages, where it may be None.
        seqused_k: `[num_seqs]` int32, live rows; advanced by n in place.
        block_table: `[num_seqs, max_blocks]` int32.
        k_descale, v_descale: `[num_seqs, num_kv_heads]` fp32 with fp8 (e4m3) caches: the stored
            value times it is the row; the nearest, ties to even, and at most 448 times it.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: a dtype that is not fp16, bf16, fp32, or of the caches fp8 (e4m3), and
            fp8 on a GPU of compute capability below 8.9.
    """
    launch = _prepare(
        k, v, k_cache, v_cache, cu_seqlens_k, seqused_k, block_table, k_descale, v_descale
    )
    with current(k.device):
        _append_kernel.run(
            **launch,
            new_k_ptr=k,
            new_v_ptr=v,
            k_ptr=k_cache,
            v_ptr=v_cache,
            cu_seqlens_k_ptr=cu_seqlens_k,
            seqused_k_ptr=seqused_k,
            block_table_ptr=block_table,
            k_descale_ptr=k_descale,
            v_descale_ptr=v_descale,
        )


@once_per_signature
def _prepare(
    k, v, k_cache, v_cache, cu_seqlens_k, seqused_k, block_table, k_descale, v_descale
) -> Launch:
    _check(k, v, k_cache, v_cache, cu_seqlens_k, seqused_k, block_table, k_descale, v_descale)
    num_seqs, n, num_kv_heads, d = k.shape
    constants = {
        **cache_constants(block_table, k=k_cache, v=v_cache),
        "n": n,
        "num_kv_heads": num_kv_heads,
        "stride_new_k_seq": k.stride(0),
        "stride_new_k_row": k.stride(1),
        "stride_new_k_head": k.stride(2),
        "stride_new_v_seq": v.stride(0),
        "stride_new_v_row": v.stride(1),
        "stride_new_v_head": v.stride(2),
        "HEAD_SIZE": d,
        "HEAD_SIZE_V": v.shape[-1],
        "D": padded(max(d, v.shape[-1])),
        "BLOCK": 16 if n * num_kv_heads <= 16 else 32,
        "num_warps": 4,
    }
    return Launch((num_seqs,), constants)


def _check(
    k, v, k_cache, v_cache, cu_seqlens_k, seqused_k, block_table, k_descale, v_descale
) -> None:
    expect_same_device(
        k=k,
        v=v,
        k_cache=k_cache,
        v_cache=v_cache,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    expect(k.dim() == 4, "k", f"shape {tuple(k.shape)}", "[num_seqs, n, num_kv_heads, d]")
    expect_shape("v", v, (*k.shape[:3], v.shape[-1]))
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        expect_float(name, x)
        got, expected = f"shape {tuple(cache.shape)}", f"(..., {tuple(x.shape[-2:])})"
        expect(cache.shape[-2:] == x.shape[-2:], f"{name}_cache", got, expected)
    expect_rows(block_table, or_fp8=True, k_cache=k_cache, v_cache=v_cache)
    num_seqs = k.shape[0]
    expect_starts("cu_seqlens_k", cu_seqlens_k, block_table=block_table)
    for name, x, cache, descale in (("k", k, k_cache, k_descale), ("v", v, v_cache, v_descale)):
        is_fp8 = cache.dtype == FP8
        if not is_fp8:
            expect_dtype(f"{name}_cache", cache, x.dtype)
        expect_descale(f"{name}_descale", descale, is_fp8, (num_seqs, k.shape[2]))
    expect_per_sequence(
        num_seqs, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, block_table=block_table
    )
