"""Fused sparsity measure and token scores from the post-vision rows (Tu et al., ICLR 2025).

Eq. 1 and 2 and the accumulated post-vision attention in two passes over the keys. The τ x m
attention matrix never exists in memory, K is read once per KV head and pass, and nothing adds
floats atomically, so two runs agree bit for bit.

1. Rows: maximum and normaliser of every query row, split over the keys so that one long prompt
   fills the GPU; a small kernel combines the splits in a fixed order.
2. Columns: each program owns a block of keys, recomputes their logits for all query rows, sums
   the probabilities over rows and counts the entries that pass the filter.

Both passes hold one operand of the product and stream the other, and reduce along the streamed
one, which is the cheap direction in the tensor cores' register layout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .checks import (
    expect,
    expect_array,
    expect_per_sequence,
    expect_queries,
    expect_same_device,
    expect_sinks,
    expect_starts,
)
from .launch import (
    Launch,
    cache_constants,
    current,
    num_multiprocessors,
    once_per_signature,
    padded,
)
from .score_kernels import _column_kernel, _row_kernel, _row_stats_kernel
from .types import PostVisionStats

MAX_SPLITS = 128  # _row_stats_kernel holds all splits of a row at once
ROWS_COMBINED = 32  # by one of its programs


class RowPass(NamedTuple):
    """Launch of the row pass: each program takes BLOCK_M rows and split_size keys."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    num_row_blocks: int
    num_splits: int
    split_size: int


class ColumnPass(NamedTuple):
    """Launch of the column pass: each program takes BLOCK_N keys and streams BLOCK_M rows.

    Rows that need a mask go by in blocks of SMALL_M: few are wasted where the rows end.
    """

    BLOCK_M: int
    SMALL_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def row_pass_launch(
    head_size: int,
    itemsize: int,
    group: int,
    num_kv_heads: int,
    total_q: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    multiprocessors: int,
) -> RowPass:
    """Block sizes by the head size, splits so that two programs run on each multiprocessor.

    Only more or fewer than 64 rows, never a number of keys, changes what is compiled.
    """
    big = itemsize == 2 and head_size <= 128 and max_seqlen_q * group > 64
    if itemsize == 4:
        # No matrix instruction is exact for fp32: every output takes whole rows into registers.
        block_m, block_n, num_warps, num_stages = 32, 32, 16, 2
    else:
        block_m, num_warps = (128, 8) if big else (64, 4)
        block_n, num_stages = 64, 3 if head_size <= 128 else 2
    block_m = max(block_m, triton.next_power_of_2(group))
    # Rows of all sequences, as if packed without gaps: sequences without rows take no programs.
    programs = triton.cdiv(max(total_q * group, 1), block_m) * num_kv_heads
    key_blocks = max(triton.cdiv(max_seqlen_k, block_n), 1)
    num_splits = max(min(2 * multiprocessors // programs, key_blocks, MAX_SPLITS), 1)
    split_size = triton.cdiv(key_blocks, num_splits) * block_n
    return RowPass(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        num_row_blocks=max(triton.cdiv(max_seqlen_q * group, block_m), 1),
        num_splits=max(triton.cdiv(max_seqlen_k, split_size), 1),
        split_size=split_size,
    )


def column_pass_launch(head_size: int, itemsize: int, group: int) -> ColumnPass:
    """Block sizes by the head size alone."""
    if itemsize == 4:
        block_m, small_m, block_n, num_warps = 32, 32, 32, 16
    elif head_size <= 128:
        block_m, small_m, block_n, num_warps = 64, 32, 128, 8
    else:
        block_m, small_m, block_n, num_warps = 64, 32, 64, 4
    group_padded = triton.next_power_of_2(group)
    return ColumnPass(
        BLOCK_M=max(block_m, group_padded),
        SMALL_M=max(small_m, group_padded),
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=3 if itemsize == 2 and head_size <= 128 else 2,
    )


def post_vision_stats(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    threshold: float = 0.01,
    softcap: float = 0.0,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    row_weights: Tensor | None = None,
    row_reduction: str = "sum",
    group_reduction: str = "mean",
) -> PostVisionStats:
    """Sparsity counts (eq. 1 and 2) and token scores ψ of one layer.

    The causal mask is aligned bottom-right: the last query row sees every key of its sequence. An
    entry passes the filter when its logit is within ln(threshold) of its row's maximum. A
    left-padded batch is expressed by giving each run of pads a sequence of its own that has no
    query rows.

    Args:
        q: `[total_q, num_heads, d]` fp16, bf16 or fp32, the post-vision rows only, packed, after
            RoPE; d from 1 to 256.
        k: `[total_k, num_kv_heads, d]`, or pages `[num_blocks, page_size, num_kv_heads, d]`, of
            q's dtype; any strides whose last is 1.
        cu_seqlens_q, cu_seqlens_k: `[num_seqs + 1]` int32. With pages, cu_seqlens_k places the
            sequences in `scores` (width num_seqs * max_seqlen_k) and bounds their lengths.
        max_seqlen_q, max_seqlen_k: host upper bounds of the lengths.
        softmax_scale: above 0; default 1 / sqrt(d).
        threshold: p of eq. 1, above 0 and at most 1.
        softcap: logits become tanh(logits / softcap) * softcap where it is above 0, first of all.
        seqused_k: `[num_seqs]` int32, live keys of each sequence; default all.
        block_table: `[num_seqs, max_blocks]` int32, the pages of each sequence in order.
        sinks: `[num_heads]` fp16, bf16 or fp32, attention sinks as varlen_decode has them: no key
            receives what they take of a row's attention, so that a row gives out less than 1. The
            filter compares entries with the maximum of their row's, in which sinks have no part:
            they make all entries less by one factor, and the counts stay what they were.
        row_weights: `[total_q]` fp32, at least 0: what each row's attention counts in the scores.
        row_reduction: "sum" or "max", of a key's attention over the rows of a query head.
        group_reduction: "mean" or "max", of that over the query heads of a KV head.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: a dtype that is not fp16, bf16 or fp32, or a head size above 256.
    """
    launch = _prepare(
        q,
        k,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        block_table,
        sinks,
        row_weights,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        threshold=threshold,
        softcap=softcap,
        row_reduction=row_reduction,
        group_reduction=group_reduction,
        multiprocessors=num_multiprocessors(q.device),
    )
    num_seqs, num_heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    scores = q.new_zeros(*launch.scores_shape, dtype=torch.float32)
    retained = q.new_empty(num_seqs, num_heads, dtype=torch.int64)
    visible = q.new_empty(num_seqs, dtype=torch.int64)
    row_stats = q.new_empty(launch.row_stats_size, dtype=torch.float32)
    shared = {
        "q_ptr": q,
        "k_ptr": k,
        "cu_seqlens_q_ptr": cu_seqlens_q,
        "cu_seqlens_k_ptr": cu_seqlens_k,
        "seqused_k_ptr": seqused_k,
        "block_table_ptr": block_table,
        "retained_ptr": retained,
    }
    with current(q.device):
        _row_kernel.run(**launch.rows, visible_ptr=visible, row_stats_ptr=row_stats, **shared)
        _row_stats_kernel.run(**launch.row_stats, sinks_ptr=sinks, row_stats_ptr=row_stats)
        _column_kernel.run(
            **launch.columns,
            row_stats_ptr=row_stats,
            row_weights_ptr=row_weights,
            scores_ptr=scores,
            **shared,
        )
    return PostVisionStats(scores, retained, visible)


class _Prepared(NamedTuple):
    """Launches of a signature, and how large what they write is."""

    rows: Launch
    row_stats: Launch
    columns: Launch
    scores_shape: tuple[int, int]
    row_stats_size: int


@once_per_signature
def _prepare(
    q,
    k,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    block_table,
    sinks,
    row_weights,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    threshold: float,
    softcap: float,
    row_reduction: str,
    group_reduction: str,
    multiprocessors: int,
) -> _Prepared:
    """Checks and the three launches. Over 60 lines by their arguments, a line each."""
    _check(q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale, threshold, seqused_k, block_table)
    _check_reductions(q, row_weights, row_reduction, group_reduction)
    expect_sinks(sinks, q, 1)
    total_q, num_heads, d = q.shape
    num_kv_heads = k.shape[-2]
    group = num_heads // num_kv_heads
    num_seqs = cu_seqlens_q.shape[0] - 1
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    # What the rows' maxima are multiplied with; with a cap they are of tanh(logits / softcap).
    factor = softcap if softcap > 0 else scale
    scale_log2 = factor * math.log2(math.e)
    rows = row_pass_launch(
        d,
        q.element_size(),
        group,
        num_kv_heads,
        total_q,
        max_seqlen_q,
        max_seqlen_k,
        multiprocessors,
    )
    columns = column_pass_launch(d, q.element_size(), group)
    total_k = k.shape[0] if block_table is None else num_seqs * max_seqlen_k
    group_padded = triton.next_power_of_2(group)
    num_rows = num_kv_heads * total_q * group_padded
    shared = {
        **cache_constants(block_table, k=k),
        "scale_log2": scale_log2,
        "tanh_log2": 2.0 * scale / softcap * math.log2(math.e) if softcap > 0 else None,
        "total_q": total_q,
        "stride_q_row": q.stride(0),
        "stride_q_head": q.stride(1),
        "HEAD_SIZE": d,
        "D": padded(d),
        "GROUP": group,
        "GROUP_PADDED": group_padded,
    }
    row_stats = {
        "scale_log2": scale_log2,
        "margin": math.log(threshold) / factor,  # in units of the maxima
        "num_rows": num_rows,
        "num_splits": rows.num_splits,
        "rows_per_head": total_q * group_padded,
        "MAX_SPLITS": MAX_SPLITS,
        "GROUP": group,
        "GROUP_PADDED": group_padded,
        "BLOCK": ROWS_COMBINED,
        "num_warps": 4,
    }
    column_pass = {
        **shared,
        "total_k": total_k,
        "ROW_MAX": row_reduction == "max",
        "GROUP_MAX": group_reduction == "max",
        **columns._asdict(),
    }
    row_grid = (rows.num_row_blocks * rows.num_splits, num_kv_heads, num_seqs)
    column_grid = (triton.cdiv(max_seqlen_k, columns.BLOCK_N), num_kv_heads, num_seqs)
    return _Prepared(
        Launch(row_grid, {**shared, **rows._asdict()}),
        Launch((triton.cdiv(num_rows, ROWS_COMBINED),), row_stats),
        Launch(column_grid, column_pass),
        (num_kv_heads, total_k),
        (1 + rows.num_splits) * 2 * num_rows,
    )


def _check(
    q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale, threshold, seqused_k, block_table
) -> None:
    expect_same_device(
        q=q,
        k=k,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
    )
    expect_queries(q, block_table, k=k)
    expect_starts("cu_seqlens_k", cu_seqlens_k)  # of pages too: they place the scores
    expect_per_sequence(
        cu_seqlens_q.shape[0] - 1,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
    )
    # The filter compares logits without their scale, which one below 0 would turn round.
    positive = softmax_scale is None or softmax_scale > 0
    expect(positive, "softmax_scale", softmax_scale, "a number above 0")
    expect(0 < threshold <= 1, "threshold", threshold, "a number above 0 and at most 1")


def _check_reductions(q, row_weights, row_reduction, group_reduction) -> None:
    expect(row_reduction in ("sum", "max"), "row_reduction", repr(row_reduction), "sum or max")
    known = group_reduction in ("mean", "max")
    expect(known, "group_reduction", repr(group_reduction), "mean or max")
    if row_weights is not None:
        expect_same_device(q=q, row_weights=row_weights)
        expect_array("row_weights", row_weights, (q.shape[0],), torch.float32)
