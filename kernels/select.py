"""Exact Top-K of the token scores plus the recent window (Tu et al., ICLR 2025; recipe step 5).

One program selects for one segment, that is one (layer, sequence, KV head), so one launch serves
the whole model. A radix search over the score's bits finds the least kept score in four passes at
most, eight bits each: where those found so far tell what is kept from what is not, the rest is left
out. One more pass writes the kept positions in ascending order. Nothing is sorted and the host
learns nothing, so nothing waits for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import expect, expect_array, expect_per_sequence, expect_same_device
from .launch import Launch, current, once_per_signature
from .select_kernels import _select_kernel
from .types import Selection


class SelectLaunch(NamedTuple):
    """Launch of the selection: each program streams its segment in blocks of BLOCK scores."""

    BLOCK: int
    num_warps: int


def select_launch(max_seqlen: int) -> SelectLaunch:
    """Small blocks for short segments, which come in numbers; else many loads under way, by no more
    warps than leave a multiprocessor room for a second program: segments come by the hundred."""
    if max_seqlen <= 1024:
        return SelectLaunch(BLOCK=1024, num_warps=4)
    return SelectLaunch(BLOCK=2048, num_warps=8)


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
    total_kept = scores.numel() if total_kept is None else total_kept
    launch = _prepare(
        scores, cu_seqlens, keep, recent, max_seqlen=max_seqlen, total_kept=total_kept
    )
    indices = torch.empty(total_kept, dtype=torch.int32, device=scores.device)
    cu_kept = torch.empty(launch["grid"][0], dtype=torch.int32, device=scores.device)
    with current(scores.device):
        _select_kernel.run(
            **launch,
            scores_ptr=scores,
            cu_seqlens_ptr=cu_seqlens,
            keep_ptr=keep,
            recent_ptr=recent,
            indices_ptr=indices,
            cu_kept_ptr=cu_kept,
        )
    return Selection(indices, cu_kept)


@once_per_signature
def _prepare(scores, cu_seqlens, keep, recent, *, max_seqlen: int, total_kept: int) -> Launch:
    expect_same_device(scores=scores, cu_seqlens=cu_seqlens, keep=keep, recent=recent)
    shape = tuple(scores.shape)
    expect(scores.dim() >= 2, "scores", f"shape {shape}", "[..., num_kv_heads, total_k]")
    expect_array("scores", scores, shape, torch.float32)
    *leading, num_kv_heads, total_k = shape
    num_seqs = cu_seqlens.shape[0] - 1
    expect_per_sequence(num_seqs, cu_seqlens=cu_seqlens)
    for name, x in (("keep", keep), ("recent", recent)):
        expect_array(name, x, (*leading, num_seqs))
    expect(0 <= total_kept < 2**31, "total_kept", total_kept, "0 to 2**31 - 1, for int32 cu_kept")
    num_segments = keep.numel() * num_kv_heads
    constants = {
        "num_segments": num_segments,
        "num_seqs": num_seqs,
        "num_kv_heads": num_kv_heads,
        "total_k": total_k,
        "total_kept": total_kept,
        **select_launch(max_seqlen)._asdict(),
    }
    return Launch((num_segments + 1,), constants)  # one program more: it writes the total
