"""SnapKV (https://arxiv.org/abs/2404.14469)."""

from __future__ import annotations

from .policy import Policy
from .rows import keep_window, last_rows


def snapkv(window: int = 32, pool: int = 5) -> Policy:
    """SnapKV (Li et al., NeurIPS 2024): the last `window` rows score, smoothed over `pool`
    neighbours; the window itself is kept."""
    choices = {"allocation": "uniform", "smoothing": pool}
    return Policy("snapkv", last_rows(window), keep_window(window), choices=choices)
