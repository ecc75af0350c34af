"""MixKV (https://arxiv.org/abs/2510.20707, https://github.com/xuyang-liu16/MixKV)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .keydiff import unlikeness
from .policy import Policy, PromptStatistics
from .rows import before, keep_window, last_rows

EPS = 1e-8


def mixkv(window: int = 32, pool: int = 5) -> Policy:
    """MixKV (Liu et al., ICLR 2026) over SnapKV: importance, which is attention and value norm,
    mixed with diversity, which is how unlike the mean key a key is. The more alike the keys of a
    head are, the more diversity counts there.

    The published code reads how alike they are from a file that was made once for each model; here
    it is the prompt's own.
    """
    return Policy(
        "mixkv",
        last_rows(window),
        keep_window(window, partial(mixed, window)),
        choices={"allocation": "uniform", "smoothing": pool},
        key_value_stats=True,
    )


def mixed(window: int, statistics: PromptStatistics) -> Tensor:
    """s * diversity + (1 - s) * (attention + value norm), with s the mean cosine of two keys of the
    head; ranges and means are taken over the tokens before the window."""
    assert statistics.mean_key_norm is not None and statistics.value_norm is not None
    attention, end = statistics.attention, max(before(window, statistics.attention), 1)
    diversity = _like(attention, unlikeness(statistics), end)
    importance = attention + _like(attention, statistics.value_norm, end)
    n = attention.shape[-1]
    alike = (n * statistics.mean_key_norm.square() - 1) / max(n - 1, 1)
    return importance + alike[..., None] * (diversity - importance)


def _like(attention: Tensor, x: Tensor, end: int) -> Tensor:
    """x, moved and scaled to begin at 0 and to have the attention's mean, both before `end`."""
    least, most = x[..., :end].aminmax(dim=-1, keepdim=True)
    x = (x - least) / (most - least + EPS)
    wanted, mean = (y[..., :end].mean(-1, keepdim=True) for y in (attention, x))
    return x * (wanted / (mean + EPS))
