"""DefensiveKV and its layer-global form (https://arxiv.org/abs/2510.13334,
https://github.com/FFY0/DefensiveKV)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .policy import Policy, PromptStatistics
from .rows import before, keep_window, last_rows
from .sharing import by_scores


def defensivekv(window: int = 32, pool: int = 5, *, across_layers: bool = False) -> Policy:
    """DefensiveKV (Feng et al., 2025): the greatest attention from any of the last `window` rows
    and any head of the group, no less than its mean over tokens; the window itself is kept. The
    heads of a layer share its budget by their scores (Ada-KV without safeguard).

    Two things differ from the published code. It averages each row over `pool` neighbours before
    the maximum; here the maxima are averaged, which is the same for `pool=1`. And it goes on to
    weigh by CriticalKV's norms of values behind the output projection, which no cache has.

    Args:
        across_layers: heads of all layers share all of the budget (Layer-DefensiveKV).
    """
    return Policy(
        "defensivekv_all" if across_layers else "defensivekv",
        last_rows(window),
        keep_window(window, partial(floored, window)),
        partial(by_scores, across_layers=across_layers),
        choices={
            "allocation": "uniform",
            "row_reduction": "max",
            "group_reduction": "max",
            "smoothing": pool,
        },
    )


def floored(window: int, statistics: PromptStatistics) -> Tensor:
    """The attention, no less than its mean over the tokens before the window."""
    scores = statistics.attention
    least = scores[..., : max(before(window, scores), 1)].mean(-1, keepdim=True)
    return torch.maximum(scores, least)
