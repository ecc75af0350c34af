"""How alike the keys of a prompt are, and how long its values: what policies rank by besides
attention (KeyDiff, Park et al. 2025; MixKV, Liu et al. 2025).

K is read twice, as cosines need the mean, and V once. Nothing adds floats atomically: the
statistics of a sequence are the same on every run, and whatever other sequences there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .checks import expect_per_sequence, expect_rows, expect_same_device, expect_starts
from .key_value_stats_kernels import _cosine_kernel, _mean_kernel, _sum_kernel
from .launch import Launch, cache_constants, current, fp32_tile, once_per_signature
from .types import KeyValueStats

CHUNK = 256  # keys that one program takes, so that one long prompt fills the GPU
TILE_BYTES = 8192  # of fp32, that a program holds of K and sums up, and of V


def key_value_stats(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    *,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> KeyValueStats:
    """The mean unit key of every sequence and KV head, the cosine of each key to it, and the norm
    of each value; of one layer.

    Args:
        k, v: `[total_k, num_kv_heads, d]` (`d_v` for v) fp16, bf16 or fp32, or pages
            `[num_blocks, page_size, num_kv_heads, d]`; any strides whose last is 1.
        cu_seqlens_k: `[num_seqs + 1]` int32. With pages, it places the sequences in what is
            returned by key (width num_seqs * max_seqlen_k) and bounds their lengths.
        max_seqlen_k: host upper bound of the lengths.
        seqused_k: `[num_seqs]` int32, live keys of each sequence; default all.
        block_table: `[num_seqs, max_blocks]` int32, the pages of each sequence in order.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: a dtype that is not fp16, bf16 or fp32.
    """
    launch = _prepare(k, v, cu_seqlens_k, seqused_k, block_table, max_seqlen_k=max_seqlen_k)
    num_seqs, (num_kv_heads, d) = cu_seqlens_k.shape[0] - 1, k.shape[-2:]
    num_segments, num_chunks = launch.sums["grid"]
    sums = k.new_empty(num_segments, num_chunks, d, dtype=torch.float32)
    mean_key = k.new_empty(num_seqs, num_kv_heads, d, dtype=torch.float32)
    mean_key_norm = k.new_empty(num_seqs, num_kv_heads, dtype=torch.float32)
    key_cosine, value_norm = (
        k.new_zeros(num_kv_heads, launch.total_k, dtype=torch.float32) for _ in range(2)
    )
    stats = KeyValueStats(mean_key, mean_key_norm, key_cosine, value_norm)
    if num_segments == 0:
        return stats
    shared = {"cu_seqlens_k_ptr": cu_seqlens_k, "seqused_k_ptr": seqused_k}
    keys = {"k_ptr": k, "block_table_ptr": block_table}
    means = {"mean_ptr": mean_key, "mean_norm_ptr": mean_key_norm}
    with current(k.device):
        _sum_kernel.run(
            **launch.sums, v_ptr=v, sum_ptr=sums, value_norm_ptr=value_norm, **keys, **shared
        )
        _mean_kernel.run(**launch.means, sum_ptr=sums, **means, **shared)
        _cosine_kernel.run(**launch.cosines, key_cosine_ptr=key_cosine, **keys, **means, **shared)
    return stats


class _Prepared(NamedTuple):
    """Launches of a signature, and the width of what they write by key."""

    sums: Launch
    means: Launch
    cosines: Launch
    total_k: int


@once_per_signature
def _prepare(k, v, cu_seqlens_k, seqused_k, block_table, *, max_seqlen_k: int) -> _Prepared:
    expect_same_device(
        k=k, v=v, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, block_table=block_table
    )
    expect_rows(block_table, k=k, v=v)
    expect_starts("cu_seqlens_k", cu_seqlens_k)  # of pages too: they place the results
    num_kv_heads, d = k.shape[-2:]
    num_seqs = cu_seqlens_k.shape[0] - 1
    per_sequence = dict(cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, block_table=block_table)
    expect_per_sequence(num_seqs, **per_sequence)
    num_segments = num_seqs * num_kv_heads
    num_chunks = max(triton.cdiv(max_seqlen_k, CHUNK), 1)
    total_k = k.shape[0] if block_table is None else num_seqs * max_seqlen_k
    shared = {"num_kv_heads": num_kv_heads, "HEAD_SIZE": d, "num_warps": 4}
    by_key = {**shared, "total_k": total_k, "CHUNK": CHUNK}
    sums = {
        **by_key,
        **cache_constants(block_table, k=k, v=v),
        "HEAD_SIZE_V": v.shape[-1],
        **fp32_tile(max(d, v.shape[-1]), TILE_BYTES),
    }
    means = {**shared, "num_chunks": num_chunks, **fp32_tile(d, TILE_BYTES)}
    cosines = {**by_key, **cache_constants(block_table, k=k), **fp32_tile(d, TILE_BYTES)}
    return _Prepared(
        Launch((num_segments, num_chunks), sums),
        Launch((num_segments,), means),
        Launch((num_segments, num_chunks), cosines),
        total_k,
    )
