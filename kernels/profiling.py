"""What profilers are told of each launch: its bytes and FLOPs, by which Proton prints rates.

Triton asks for this (`launch_metadata`) only while a profiler listens. Bytes are what has to move:
every element that is read or written counted once, however often it comes. FLOPs are those of the
matrix products, masked halves included. Both follow the live lengths, for which these wait; while
a CUDA graph is captured nothing may wait, and replays have lengths of their own: nothing is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]  # of the kernel, by the names of its parameters


def _unless_captured(told: Callable[[Arguments], dict[str, float]]) -> Callable[..., dict]:
    def launch_metadata(grid: Any, kernel: Any, arguments: Arguments) -> dict[str, float]:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return {}
        return told(arguments)

    return launch_metadata


def _lengths(x: Arguments, bounded: bool) -> Tensor:
    """`[num_seqs]`, as addressing.live_length has them."""
    lengths, used = x["cu_seqlens_k_ptr"].diff(), x["seqused_k_ptr"]
    if used is None:
        return lengths.long()
    return (lengths.minimum(used) if bounded else used).long()


def _decode_keys(x: Arguments, paged: bool) -> Tensor:
    """`[num_seqs]`, live keys as the decode kernels believe them."""
    return _lengths(x, not paged).clamp(0, x["max_keys"])


def _flops(x: Tensor, number: int) -> dict[str, float]:
    return {f"flops{8 * x.element_size()}": float(number)}


def _head_sizes(x: Arguments) -> int:
    return x["HEAD_SIZE"] + x["HEAD_SIZE_V"]


@_unless_captured
def decode_split(x: Arguments) -> dict[str, float]:
    """K and V of all splits; with a left bound, of the last keys alone."""
    q, kv_heads, keys = (
        x["q_ptr"],
        x["num_kv_heads"],
        _decode_keys(x, x["block_table_ptr"] is not None),
    )
    rows = x["cu_seqlens_q_ptr"].diff().long()
    splits = (keys + x["split_size"] - 1) // x["split_size"]
    if x["BOUND_LEFT"]:
        keys = keys.minimum(rows + x["window_left"])
    heads = kv_heads * x["GROUP"]
    if x["DIRECT"]:
        written = int(rows.sum()) * heads * x["HEAD_SIZE_V"] * q.element_size()
    else:
        written = int((splits * rows).sum()) * heads * (x["HEAD_SIZE_V"] + 1) * 4
    read = int(keys.sum()) * kv_heads * _head_sizes(x) + q.numel()
    products = int((keys * rows).sum()) * heads * _head_sizes(x)
    return {"bytes": read * q.element_size() + written, **_flops(q, 2 * products)}


@_unless_captured
def decode_combine(x: Arguments) -> dict[str, float]:
    """The partial results of live splits, once, and the rows that they become."""
    out, rows = x["out_ptr"], x["cu_seqlens_q_ptr"].diff().long()
    splits = (_decode_keys(x, x["PAGED"]) + x["split_size"] - 1) // x["split_size"]
    read = int((splits * rows).sum()) * x["num_heads"] * (x["HEAD_SIZE_V"] + 1) * 4
    return {"bytes": read + out.numel() * out.element_size()}


@_unless_captured
def append(x: Arguments) -> dict[str, float]:
    """The new rows, read and written."""
    new = sum(rows.numel() * rows.element_size() for rows in (x["new_k_ptr"], x["new_v_ptr"]))
    return {"bytes": 2 * new}


def _post_vision(x: Arguments) -> tuple[int, int]:
    """Bytes of Q and of the live keys, and multiplications of one with the other."""
    q, keys = x["q_ptr"], _lengths(x, True)
    kv_heads = x["k_ptr"].shape[-2]
    products = int((x["cu_seqlens_q_ptr"].diff() * keys).sum()) * q.shape[1] * q.shape[2]
    elements = q.numel() + int(keys.sum()) * kv_heads * x["HEAD_SIZE"]
    return elements * q.element_size(), products


@_unless_captured
def score_rows(x: Arguments) -> dict[str, float]:
    read, products = _post_vision(x)
    return {"bytes": read + x["partials_ptr"].numel() * 4, **_flops(x["q_ptr"], 2 * products)}


@_unless_captured
def score_row_stats(x: Arguments) -> dict[str, float]:
    return {"bytes": 4 * (x["partials_ptr"].numel() + x["row_stats_ptr"].numel())}


@_unless_captured
def score_columns(x: Arguments) -> dict[str, float]:
    read, products = _post_vision(x)
    written = int(_lengths(x, True).sum()) * x["k_ptr"].shape[-2] * 4
    read += x["row_stats_ptr"].numel() * 4
    return {"bytes": read + written, **_flops(x["q_ptr"], 2 * products)}


@_unless_captured
def select(x: Arguments) -> dict[str, float]:
    """The scores once (five passes stream them), and the kept positions."""
    lengths, keep = x["cu_seqlens_ptr"].diff(), x["keep_ptr"]
    kept = keep.minimum(lengths).clamp(min=0).sum()
    scores = int(lengths.sum()) * (keep.numel() // max(len(lengths), 1))
    return {"bytes": 4 * x["num_kv_heads"] * (scores + int(kept))}


def _kept(x: Arguments) -> int:
    return int(x["cu_kept_ptr"][-1] - x["cu_kept_ptr"][0])


@_unless_captured
def compact(x: Arguments) -> dict[str, float]:
    """The kept rows, read and written, and their positions; the same in place."""
    return {"bytes": _kept(x) * (2 * _head_sizes(x) * x["k_ptr"].element_size() + 4)}


@_unless_captured
def sum_evicted(x: Arguments) -> dict[str, float]:
    """The rows that are not kept, and their sums."""
    kept = _kept(x)
    evicted = int(_lengths(x, False).sum()) * x["num_kv_heads"] - kept
    sums = x["sum_k_ptr"].numel() + x["sum_v_ptr"].numel()
    rows = evicted * _head_sizes(x) * x["k_ptr"].element_size()
    return {"bytes": rows + 4 * (sums + kept)}


@_unless_captured
def store_means(x: Arguments) -> dict[str, float]:
    """The sums, and the means of segments that evicted."""
    sums, written = x["sum_k_ptr"].numel() + x["sum_v_ptr"].numel(), x["counts_ptr"].count_nonzero()
    return {"bytes": 4 * sums + int(written) * _head_sizes(x) * x["out_k_ptr"].element_size()}
