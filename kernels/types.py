"""What the operations give, and the limits that their callers plan by."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MAX_SEQLEN_Q = 16  # query rows of a sequence that varlen_decode takes at once
FP8_MAX = 448.0  # the largest number of e4m3
# Tokens behind the kept ones may be twice as large before they saturate. It costs next to nothing:
# e4m3 is a float, and has all bits of its mantissa down to the largest number divided by 2**14.
FP8_ROOM = 2.0


class PostVisionStats(NamedTuple):
    """What the post-vision query rows say about the keys of one layer.

    scores: `[num_kv_heads, total_k]` fp32, ψ: the attention that each key receives from the
        query rows, summed over rows and averaged over the query heads of its KV head, or otherwise
        reduced. 0 for rows that belong to no live key.
    retained: `[num_seqs, num_heads]` int64, the entries that pass the ThresholdFilter.
    visible: `[num_seqs]` int64, the causally visible entries of one head; sparsity (eq. 2) is
        γ' = 1 - retained / visible.
    """

    scores: Tensor
    retained: Tensor
    visible: Tensor


class KeyValueStats(NamedTuple):
    """What the keys and values of one layer are like.

    mean_key: `[num_seqs, num_kv_heads, d]` fp32, the mean of a sequence's keys, each of norm 1.
    mean_key_norm: `[num_seqs, num_kv_heads]` fp32, from 0 to 1, where all keys have one direction.
        The mean cosine of two different keys of n is (n * mean_key_norm² - 1) / (n - 1).
    key_cosine: `[num_kv_heads, total_k]` fp32, of each key to the mean unit key.
    value_norm: `[num_kv_heads, total_k]` fp32, the Euclidean norm of each value.
        Both are 0 for rows that belong to no live key.
    """

    mean_key: Tensor
    mean_key_norm: Tensor
    key_cosine: Tensor
    value_norm: Tensor


class Selection(NamedTuple):
    """Kept positions of every segment, packed; a segment is one (layer, sequence, KV head).

    indices: `[total_kept]` int32, positions within the sequence, ascending in each segment.
        Entries behind the last segment are undefined.
    cu_kept: `[num_segments + 1]` int32, where each segment starts; layer-major, then sequence,
        then KV head.
    """

    indices: Tensor
    cu_kept: Tensor
