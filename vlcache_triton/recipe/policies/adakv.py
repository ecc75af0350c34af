"""Ada-SnapKV (https://arxiv.org/abs/2407.11550)."""

from __future__ import annotations

from functools import partial

from .policy import Policy
from .rows import keep_window, last_rows
from .sharing import by_scores


def adakv(window: int = 32, pool: int = 7, safeguard: float = 0.2) -> Policy:
    """Ada-SnapKV (Feng et al., NeurIPS 2025): SnapKV's scores; the heads of a layer share its
    budget by their scores, each having `safeguard` of its even share for certain."""
    share_heads = partial(by_scores, safeguard=safeguard)
    choices = {"allocation": "uniform", "smoothing": pool}
    return Policy("adakv", last_rows(window), keep_window(window), share_heads, choices)
