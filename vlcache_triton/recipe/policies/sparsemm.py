"""SparseMM (https://arxiv.org/abs/2506.05344, https://github.com/CR400AF-A/SparseMM)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..budgets import share_out
from .policy import Policy, PromptStatistics
from .rows import keep_window, last_rows


def sparsemm(hits: Tensor, ratio: float = 0.1, window: int = 32, pool: int = 5) -> Policy:
    """SparseMM (Wang et al., ICCV 2025): SnapKV's scores, and more of the budget for heads that
    look at the words that are read off an image.

    The window is kept of every head, and `ratio` of an even share of what is left; the rest goes by
    the hits of the query heads of a KV head, over all layers.

    Args:
        hits: `[num_layers, num_heads]`, at least 0: how often each query head looks at the image
            where the answer is. `profile.read_hits` reads the files that their code writes.
        ratio: in [0, 1].

    Raises:
        ValueError: for hits or a ratio out of range.
    """
    if hits.ndim != 2 or not bool((hits >= 0).all()) or not float(hits.sum()) > 0:
        raise ValueError(
            f"hits: got shape {tuple(hits.shape)} from {hits.min()} to {hits.max()}, expected"
            " [num_layers, num_heads] of at least 0, not all 0"
        )
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: got {ratio}, expected a number in [0, 1]")
    share_heads = partial(_by_hits, hits.double().cpu(), ratio, window)
    choices = {"allocation": "uniform", "smoothing": pool}
    return Policy("sparsemm", last_rows(window), keep_window(window), share_heads, choices)


def _by_hits(
    hits: Tensor,
    ratio: float,
    window: int,
    scores: Tensor,
    statistics: PromptStatistics,
    keep: Tensor,
) -> Tensor:
    num_layers, num_heads, length = scores.shape
    if len(hits) != num_layers or hits.shape[1] % num_heads:
        raise ValueError(
            f"hits: got shape {tuple(hits.shape)}, expected ({num_layers}, a multiple of"
            f" {num_heads}): of this model's layers, and of its query heads"
        )
    even = int(keep.min())
    certain = window + int(ratio * (even - window)) if even > window else even
    rest = int(keep.sum()) * num_heads - certain * num_layers * num_heads
    weights = hits.view(num_layers, num_heads, -1).sum(-1)
    return certain + share_out(weights.flatten(), rest, 0, length - certain).view_as(weights)
