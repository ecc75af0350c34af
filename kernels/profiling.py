"""What profilers are told of each launch: its bytes and FLOPs, by which Proton prints rates.

Triton asks for this (`launch_metadata`) only while a profiler listens. Bytes are what has to move:
every element that is read or written counted once, however often it comes. FLOPs are those of the
matrix products, masked halves included. Both follow the live lengths, for which these wait; while
a CUDA graph is captured nothing may wait, and replays have lengths of their own: nothing is told.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]  # of the kernel, by the names of its parameters
Told = Callable[[Arguments], tuple[int, int]]  # bytes, and multiplications with an addition each


def _launch_metadata(told: Told) -> Callable[[Any, Any, Arguments], dict[str, float]]:
    @wraps(told)
    def metadata(grid: Any, kernel: Any, x: Arguments) -> dict[str, float]:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return {}
        moved, products = told(x)
        if not products:
            return {"bytes": moved}
        return {"bytes": moved, f"flops{8 * x['q_ptr'].element_size()}": 2.0 * products}

    return metadata


def _size(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _descales(x: Arguments) -> int:
    return _size(x.get("k_descale_ptr"), x.get("v_descale_ptr"))


def _row_size(x: Arguments, k: str) -> int:
    """Bytes of a row of K and of V: of that argument, and of the one that is called so of V."""
    v = k.replace("k_ptr", "v_ptr")
    return x["HEAD_SIZE"] * x[k].element_size() + x["HEAD_SIZE_V"] * x[v].element_size()


def _lengths(x: Arguments, bounded: bool) -> Tensor:
    """`[num_seqs]` int64, as addressing.live_length has them."""
    starts, used = x["cu_seqlens_k_ptr"], x["seqused_k_ptr"]
    if used is not None and not bounded:  # nor need there be starts
        return used.long()
    lengths = starts.diff()
    return (lengths if used is None else lengths.minimum(used)).long()


def _decode(x: Arguments, paged: bool, num_heads: int) -> tuple[Tensor, Tensor, int]:
    """`[num_seqs]` query rows and live keys as the kernels believe them; bytes of partial rows."""
    rows = x["cu_seqlens_q_ptr"].diff().long()
    keys = _lengths(x, not paged).clamp(0, x["max_keys"])
    splits = (keys + x["split_size"] - 1) // x["split_size"]
    return rows, keys, int((splits * rows).sum()) * num_heads * (x["HEAD_SIZE_V"] + 1) * 4


@_launch_metadata
def decode_split(x: Arguments) -> tuple[int, int]:
    """K and V of all splits; with a left bound, of the last keys alone."""
    num_heads = x["num_kv_heads"] * x["GROUP"]
    rows, keys, partial = _decode(x, x["block_table_ptr"] is not None, num_heads)
    if x["BOUND_LEFT"]:
        keys = keys.minimum(rows + x["window_left"])
    read = _size(x["q_ptr"]) + _descales(x)
    read += int(keys.sum()) * x["num_kv_heads"] * _row_size(x, "k_ptr")
    products = int((keys * rows).sum()) * num_heads * (x["HEAD_SIZE"] + x["HEAD_SIZE_V"])
    return read + (_size(x["out_ptr"]) if x["DIRECT"] else partial), products


@_launch_metadata
def decode_combine(x: Arguments) -> tuple[int, int]:
    """The partial results of live splits, and the rows that they become."""
    return _decode(x, x["PAGED"], x["num_heads"])[-1] + _size(x["out_ptr"]), 0


def _pieces(x: Arguments, num_heads: int) -> int:
    """Bytes of the partial rows of sequences that several programs share."""
    begins = x["schedule_ptr"][: x["num_seqs"] + 1].long()
    share = max(-(-int(begins[-1]) // x["num_programs"]), x["min_share"])
    pieces = (begins[1:] - 1) // share - begins[:-1] // share + 1
    rows = x["cu_seqlens_q_ptr"].diff().long()
    shared = pieces.where((begins.diff() > 0) & (pieces > 1), 0)
    return int((shared * rows).sum()) * num_heads * (x["HEAD_SIZE_V"] + 1) * 4


@_launch_metadata
def schedule(x: Arguments) -> tuple[int, int]:
    """The lengths, and the table."""
    lengths = [y for y in (x["cu_seqlens_k_ptr"], x["seqused_k_ptr"]) if y is not None]
    return _size(*lengths, x["schedule_ptr"]), 0


@_launch_metadata
def decode_scheduled(x: Arguments) -> tuple[int, int]:
    """K and V of all sequences; with a left bound, of the last keys alone."""
    num_heads = x["num_kv_heads"] * x["GROUP"]
    rows = x["cu_seqlens_q_ptr"].diff().long()
    keys = _lengths(x, x["block_table_ptr"] is None).clamp(0, x["max_keys"])
    if x["BOUND_LEFT"]:
        keys = keys.minimum(rows + x["window_left"])
    read = _size(x["q_ptr"]) + _descales(x)
    read += int(keys.sum()) * x["num_kv_heads"] * _row_size(x, "k_ptr")
    products = int((keys * rows).sum()) * num_heads * (x["HEAD_SIZE"] + x["HEAD_SIZE_V"])
    return read + _pieces(x, num_heads), products


@_launch_metadata
def decode_combine_pieces(x: Arguments) -> tuple[int, int]:
    """The pieces of shared sequences, and the output, which others have written in part."""
    return _pieces(x, x["num_kv_heads"] * x["GROUP"]) + _size(x["out_ptr"]), 0


@_launch_metadata
def append(x: Arguments) -> tuple[int, int]:
    """The new rows, read and written."""
    rows = x["new_k_ptr"].shape[:3].numel()
    read = _size(x["new_k_ptr"], x["new_v_ptr"]) + _descales(x)
    return read + rows * _row_size(x, "k_ptr"), 0


def _post_vision(x: Arguments, others: int) -> tuple[int, int]:
    q, keys = x["q_ptr"], _lengths(x, True)
    rows = x["k_ptr"].shape[-2] * x["HEAD_SIZE"] * x["k_ptr"].element_size()
    products = int((x["cu_seqlens_q_ptr"].diff() * keys).sum()) * q.shape[1] * q.shape[2]
    return _size(q) + int(keys.sum()) * rows + others, products


def _row_stats_size(x: Arguments) -> int:
    """Bytes of two numbers for each query row and head, of all splits or of one."""
    return 8 * x["k_ptr"].shape[-2] * x["total_q"] * x["GROUP_PADDED"]


@_launch_metadata
def score_rows(x: Arguments) -> tuple[int, int]:
    """Q, the live keys, and the partial results."""
    return _post_vision(x, x["num_splits"] * _row_stats_size(x))


@_launch_metadata
def score_row_stats(x: Arguments) -> tuple[int, int]:
    """Partial results, and what they become."""
    return _size(x["row_stats_ptr"]), 0


@_launch_metadata
def score_columns(x: Arguments) -> tuple[int, int]:
    """Q, the live keys and the rows' statistics, and the keys' scores."""
    scores = int(_lengths(x, True).sum()) * x["k_ptr"].shape[-2] * 4
    return _post_vision(x, _row_stats_size(x) + scores)


@_launch_metadata
def select(x: Arguments) -> tuple[int, int]:
    """The scores once (up to five passes stream them), and the kept positions."""
    lengths, keep = x["cu_seqlens_ptr"].diff(), x["keep_ptr"]
    kept = int(keep.minimum(lengths).clamp(min=0).sum())
    return 4 * x["num_kv_heads"] * (int(lengths.expand_as(keep).sum()) + kept), 0


@_launch_metadata
def compact(x: Arguments) -> tuple[int, int]:
    """The kept rows, read and written, and their positions; the same in place."""
    kept = int(x["cu_kept_ptr"][-1] - x["cu_kept_ptr"][0])
    written = "out_k_ptr" if "out_k_ptr" in x else "k_ptr"
    return kept * (_row_size(x, "k_ptr") + _row_size(x, written) + 4) + _descales(x), 0


@_launch_metadata
def kept_amax(x: Arguments) -> tuple[int, int]:
    """The kept rows and their positions, and the maxima."""
    kept = int(x["cu_kept_ptr"][-1] - x["cu_kept_ptr"][0])
    return kept * (_row_size(x, "k_ptr") + 4) + _size(x["amax_k_ptr"], x["amax_v_ptr"]), 0


@_launch_metadata
def sum_evicted(x: Arguments) -> tuple[int, int]:
    """The rows that are not kept, the positions of those that are, and the sums."""
    kept = int(x["cu_kept_ptr"][-1] - x["cu_kept_ptr"][0])
    evicted = int(_lengths(x, False).sum()) * x["num_kv_heads"] - kept
    return evicted * _row_size(x, "k_ptr") + 4 * kept + _size(x["sum_k_ptr"], x["sum_v_ptr"]), 0


@_launch_metadata
def store_means(x: Arguments) -> tuple[int, int]:
    """The sums, and the means of segments that have evicted."""
    written = int(x["counts_ptr"].count_nonzero()) * _row_size(x, "out_k_ptr")
    return _size(x["sum_k_ptr"], x["sum_v_ptr"]) + _descales(x) + written, 0


def _live_rows(x: Arguments, row_size: int) -> int:
    return int(_lengths(x, True).sum()) * x["num_kv_heads"] * row_size


@_launch_metadata
def unit_key_sums(x: Arguments) -> tuple[int, int]:
    """K and V, the norms, and the partial sums."""
    return _live_rows(x, _row_size(x, "k_ptr") + 4) + _size(x["sum_ptr"]), 0


@_launch_metadata
def mean_unit_keys(x: Arguments) -> tuple[int, int]:
    """The partial sums, and what they become."""
    return _size(x["sum_ptr"], x["mean_ptr"], x["mean_norm_ptr"]), 0


@_launch_metadata
def key_cosines(x: Arguments) -> tuple[int, int]:
    """K, the means, and the cosines."""
    row_size = x["HEAD_SIZE"] * x["k_ptr"].element_size() + 4
    return _live_rows(x, row_size) + _size(x["mean_ptr"], x["mean_norm_ptr"]), 0
