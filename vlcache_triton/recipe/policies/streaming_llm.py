"""StreamingLLM (https://arxiv.org/abs/2309.17453)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .policy import Policy, PromptStatistics
from .rows import last_rows


def streaming_llm(sinks: int = 4) -> Policy:
    """StreamingLLM (Xiao et al., ICLR 2024): the first tokens, the sinks, and the most recent."""
    # At least one token is recent by configuration, so the sinks never take the whole budget.
    choices = {"allocation": "uniform", "recent_fraction": 0.0}
    return Policy("streaming_llm", last_rows(1), partial(_ends, sinks), choices=choices)


def _ends(sinks: int, statistics: PromptStatistics) -> Tensor:
    scores = statistics.attention
    position = torch.arange(scores.shape[-1], dtype=scores.dtype, device=scores.device)
    position[:sinks] = torch.inf
    return position.expand_as(scores)
