"""Which rows are measured, and how a policy keeps some tokens before all others."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .policy import PromptStatistics, QueryRows, Scoring

FIRST_RANK = 1e6  # above any sum of attention, and whole numbers from here on are exact in fp32


def all_rows(post_vision: int, length: int) -> int:
    """All rows of the prompt."""
    return length


def last_rows(n: int) -> QueryRows:
    """The last `n` rows of the prompt, or all that it has."""
    return partial(_at_most, n)


def _at_most(n: int, post_vision: int, length: int) -> int:
    return min(n, length)


def keep_window(window: int, score: Scoring | None = None) -> Scoring:
    """`score`, or attention as measured, but for the last `window` tokens: these outrank the
    others, the latest first."""
    return partial(_window_first, window, score)


def _window_first(window: int, score: Scoring | None, statistics: PromptStatistics) -> Tensor:
    scores = statistics.attention if score is None else score(statistics)
    ranked = scores[..., : before(window, scores)]
    window = scores.shape[-1] - ranked.shape[-1]  # of a short prompt all of it
    ranks = FIRST_RANK + torch.arange(window, device=scores.device)
    return torch.cat([ranked, ranks.to(scores).expand(*scores.shape[:-1], -1)], -1)


def before(window: int, scores: Tensor) -> int:
    """How many tokens come before the last `window`."""
    return max(scores.shape[-1] - window, 0)
