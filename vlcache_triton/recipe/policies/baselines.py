"""What is compared with besides published policies: everything, chance, and hindsight."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .policy import Policy, PromptStatistics
from .rows import last_rows


def full() -> Policy:
    """The whole cache, whatever the budget."""
    return Policy("full", choices={"budget": 1.0, "max_cache_tokens": None})


def random_tokens(seed: int = 0) -> Policy:
    """Tokens drawn at random for each layer and head; a prompt of one length draws the same."""
    score = partial(_at_random, seed)
    return Policy("random", last_rows(1), score, choices={"allocation": "uniform"})


def hindsight(attention: Tensor) -> Policy:
    """The attention oracle: ranks tokens by what decoding did attend to, which no policy can know.

    Layers share the budget as configured; one token, the last, is kept for being recent.

    Args:
        attention: `[num_layers, num_kv_heads, length]` fp32, the attention that the prompt's
            tokens received from the answer's rows with the full cache. Of one prompt.
    """
    score = partial(_as_attended, attention)
    return Policy("hindsight", score=score, choices={"recent_fraction": 0.0})


def _at_random(seed: int, statistics: PromptStatistics) -> Tensor:
    scores = statistics.attention
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(scores.shape, generator=generator).to(scores.device)


def _as_attended(attention: Tensor, statistics: PromptStatistics) -> Tensor:
    shape = statistics.attention.shape
    if shape != attention.shape:
        raise ValueError(
            f"attention: got shape {tuple(attention.shape)}, expected {tuple(shape)}"
            " (num_layers, num_kv_heads, length), of the prompt that is compressed"
        )
    return attention.to(statistics.attention.device)
