"""Exact Top-K of the token scores plus the recent window (Tu et al., ICLR 2025; recipe step 5).

One program selects for one segment, that is one (layer, sequence, KV head), so one launch serves
the whole model. A radix search over the score's bits finds the least kept score in four passes,
eight bits each; a fifth pass writes the kept positions in ascending order. Nothing is sorted and
the host learns nothing, so nothing waits for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import expect, expect_int32, expect_same_device


class Selection(NamedTuple):
    """Kept positions of every segment, packed; a segment is one (layer, sequence, KV head).

    indices: `[total_kept]` int32, positions within the sequence, ascending in each segment.
        Entries behind the last segment are undefined.
    cu_kept: `[num_segments + 1]` int32, where each segment starts; layer-major, then sequence,
        then KV head.
    """

    indices: Tensor
    cu_kept: Tensor


class SelectLaunch(NamedTuple):
    """Launch of the selection: each program streams its segment in blocks of BLOCK scores."""

    BLOCK: int
    num_warps: int


def select_launch(max_seqlen: int) -> SelectLaunch:
    """Small blocks for short segments, which come in numbers; else many loads under way."""
    if max_seqlen <= 1024:
        return SelectLaunch(BLOCK=1024, num_warps=4)
    return SelectLaunch(BLOCK=4096, num_warps=16)


def select_tokens(
    scores: Tensor,
    cu_seqlens: Tensor,
    keep: Tensor,
    recent: Tensor,
    *,
    max_seqlen: int,
    total_kept: int | None = None,
) -> Selection:
    """Keep the `recent` last tokens of each sequence and the Top-K of the rest.

    Ties go to the lower position; -0.0 equals 0.0. The result is the same on every run.

    Args:
        scores: `[..., num_kv_heads, total_k]` fp32 without NaN, contiguous; leading dimensions
            are layers.
        cu_seqlens: `[num_seqs + 1]` int32, where the sequences lie in total_k.
        keep: `[..., num_seqs]` int32 on the device of scores, tokens to keep, recent ones
            included; clamped to the sequence's length.
        recent: like keep; clamped to keep.
        max_seqlen: host upper bound of the lengths; only speed depends on it.
        total_kept: host upper bound of Σ keep * num_kv_heads, the size of `indices`; default
            scores.numel(). Budgets are exact, so callers know it without a sync. What does not
            fit is not written.

    Raises:
        ValueError: an argument that does not fit the others, by name.
    """
    expect_same_device(scores=scores, cu_seqlens=cu_seqlens, keep=keep, recent=recent)
    shape = tuple(scores.shape)
    expect(scores.dim() >= 2, "scores", f"shape {shape}", "[..., num_kv_heads, total_k]")
    expect(scores.dtype == torch.float32, "scores", f"dtype {scores.dtype}", "torch.float32")
    expect(scores.is_contiguous(), "scores", f"strides {scores.stride()}", "a contiguous tensor")
    *leading, num_kv_heads, total_k = shape
    num_seqs = cu_seqlens.shape[0] - 1
    expect_int32("cu_seqlens", cu_seqlens, (num_seqs + 1,))
    expect_int32("keep", keep, (*leading, num_seqs))
    expect_int32("recent", recent, (*leading, num_seqs))
    total_kept = scores.numel() if total_kept is None else total_kept
    expect(0 <= total_kept < 2**31, "total_kept", total_kept, "0 to 2**31 - 1, for int32 cu_kept")

    num_segments = keep.numel() * num_kv_heads
    indices = torch.empty(total_kept, dtype=torch.int32, device=scores.device)
    cu_kept = torch.empty(num_segments + 1, dtype=torch.int32, device=scores.device)
    launch = select_launch(max_seqlen)
    with torch.cuda.device_of(scores):  # the model may lie on several devices
        # One program more than segments: it writes the total.
        _select_kernel[(num_segments + 1,)](
            scores_ptr=scores,
            cu_seqlens_ptr=cu_seqlens,
            keep_ptr=keep,
            recent_ptr=recent,
            indices_ptr=indices,
            cu_kept_ptr=cu_kept,
            num_segments=num_segments,
            num_seqs=num_seqs,
            num_kv_heads=num_kv_heads,
            total_k=total_k,
            total_kept=total_kept,
            BLOCK=launch.BLOCK,
            num_warps=launch.num_warps,
        )
    return Selection(indices, cu_kept)


@triton.jit
def _kept_before(cu_seqlens_ptr, keep_ptr, num_seqs, end, BLOCK: tl.constexpr):
    """Kept tokens of one KV head in the first `end` (layer, sequence) pairs."""
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, end, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        mask = pairs < end
        seqs = pairs % num_seqs
        length = tl.load(cu_seqlens_ptr + seqs + 1, mask=mask, other=0)
        length -= tl.load(cu_seqlens_ptr + seqs, mask=mask, other=0)
        keep = tl.load(keep_ptr + pairs, mask=mask, other=0)
        total += tl.maximum(tl.minimum(keep, length), 0)
    return tl.sum(total)


@triton.jit
def _load_ranks(scores_ptr, positions, end):
    """Scores at positions below `end` as unsigned integers that fall as the scores rise."""
    scores = tl.load(scores_ptr + positions, mask=positions < end, other=0.0)
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -(2**31), 0, bits)  # -0.0
    return tl.where(bits < 0, bits, bits ^ 0x7FFFFFFF).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["num_segments", "num_seqs", "num_kv_heads", "total_k", "total_kept"])
def _select_kernel(
    scores_ptr,  # [num_layers, num_kv_heads, total_k]
    cu_seqlens_ptr,
    keep_ptr,  # [num_layers, num_seqs]
    recent_ptr,  # [num_layers, num_seqs]
    indices_ptr,  # [total_kept]
    cu_kept_ptr,  # [num_segments + 1]
    num_segments,
    num_seqs,
    num_kv_heads,
    total_k,
    total_kept,
    BLOCK: tl.constexpr,
):
    """Select the kept positions of one segment and write them at its place."""
    segment = tl.program_id(0)
    pair, head = segment // num_kv_heads, segment % num_kv_heads
    before = _kept_before(cu_seqlens_ptr, keep_ptr, num_seqs, pair, BLOCK) * num_kv_heads
    if segment == num_segments:
        tl.store(cu_kept_ptr + segment, before)
    else:
        layer, seq = pair // num_seqs, pair % num_seqs
        first = tl.load(cu_seqlens_ptr + seq)
        length = tl.load(cu_seqlens_ptr + seq + 1) - first
        keep = tl.maximum(tl.minimum(tl.load(keep_ptr + pair), length), 0)
        window = tl.maximum(tl.minimum(tl.load(recent_ptr + pair), keep), 0)
        offset = before + head * keep
        tl.store(cu_kept_ptr + segment, offset)

        scores_ptr += (layer.to(tl.int64) * num_kv_heads + head) * total_k + first
        ranked = length - window  # the positions that compete; the window behind them is kept
        # Find the rank of the last score that is kept, from its highest digit to its lowest:
        # `prefix` are the digits found, `taken` how many of its candidates are still to be kept.
        prefix = tl.zeros((), tl.uint32)
        taken = keep - window
        for shift in tl.static_range(24, -1, -8):
            histogram = tl.zeros((256,), tl.int32)
            for start in range(0, ranked, BLOCK):
                positions = start + tl.arange(0, BLOCK)
                ranks = _load_ranks(scores_ptr, positions, ranked)
                candidate = positions < ranked
                if shift < 24:
                    candidate = candidate & (ranks >> (shift + 8) == prefix >> (shift + 8))
                digits = (ranks >> shift) & 255
                histogram += tl.histogram(digits.to(tl.int32), 256, mask=candidate)
            up_to = tl.cumsum(histogram, 0)
            digit = tl.sum((up_to < taken).to(tl.int32))
            taken -= tl.sum(tl.where(tl.arange(0, 256) < digit, histogram, 0))
            prefix |= digit.to(tl.uint32) << shift

        # Keep what ranks before `prefix`, the first `taken` of what equals it, and the window.
        better_before = tl.zeros((), tl.int32)
        equal_before = tl.zeros((), tl.int32)
        for start in range(0, length, BLOCK):
            positions = start + tl.arange(0, BLOCK)
            ranks = _load_ranks(scores_ptr, positions, ranked)
            competes = positions < ranked
            better = ((competes & (ranks < prefix)) | ~competes).to(tl.int32)
            equal = (competes & (ranks == prefix)).to(tl.int32)
            better_rank = better_before + tl.cumsum(better, 0) - better
            equal_rank = equal_before + tl.cumsum(equal, 0) - equal
            kept = (better == 1) | ((equal == 1) & (equal_rank < taken))
            target = offset + better_rank + tl.minimum(equal_rank, taken)
            kept = kept & (positions < length) & (target < total_kept)
            tl.store(indices_ptr + target, positions, mask=kept)
            better_before += tl.sum(better)
            equal_before += tl.sum(equal)
