"""PyramidKV (https://arxiv.org/abs/2406.02069)."""

from __future__ import annotations

from .policy import Policy
from .rows import keep_window, last_rows


def pyramidkv(window: int = 8, pool: int = 7) -> Policy:
    """PyramidKV (Cai et al., 2024): SnapKV's scores, budgets that fall linearly with depth
    (β = 20)."""
    choices = {"allocation": "pyramid", "smoothing": pool}
    return Policy("pyramidkv", last_rows(window), keep_window(window), choices=choices)
