"""Ada-SnapKV (https://arxiv.org/abs/2407.11550)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .policy import Policy, PromptStatistics
from .rows import keep_window, last_rows
from .sharing import adaptive_heads


def adakv(window: int = 32, pool: int = 7, safeguard: float = 0.2) -> Policy:
    """Ada-SnapKV (Feng et al., NeurIPS 2025): SnapKV's scores; the heads of a layer share its
    budget by their scores, each having `safeguard` of its even share for certain."""
    share_heads = partial(_by_score, safeguard)
    choices = {"allocation": "uniform", "smoothing": pool}
    return Policy("adakv", last_rows(window), keep_window(window), share_heads, choices)


def _by_score(
    safeguard: float, scores: Tensor, statistics: PromptStatistics, keep: Tensor
) -> Tensor:
    return adaptive_heads(scores, keep, safeguard)
