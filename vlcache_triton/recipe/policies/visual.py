"""For policies that tell visual tokens from text."""

from __future__ import annotations

import torch
from torch import Tensor

from .policy import PromptStatistics


def visual_tokens(statistics: PromptStatistics) -> Tensor:
    """`[length]` bool.

    Raises:
        ValueError: where the prompt does not say which of its tokens are visual.
    """
    if statistics.is_visual is None:
        raise ValueError("is_visual: got None, expected a prompt that says which tokens are visual")
    return statistics.is_visual


def text_first(statistics: PromptStatistics) -> Tensor:
    """The attention, but text outranks all that is visual."""
    attention, text = statistics.attention, ~visual_tokens(statistics)
    return torch.where(text, attention + attention.amax(-1, keepdim=True) + 1.0, attention)
