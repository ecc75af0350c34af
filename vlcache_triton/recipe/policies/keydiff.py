"""KeyDiff (https://arxiv.org/abs/2504.15364, https://github.com/NVIDIA/kvpress)."""

from __future__ import annotations

from torch import Tensor

from .policy import Policy, PromptStatistics
from .rows import last_rows


def keydiff() -> Policy:
    """KeyDiff (Park et al., NeurIPS 2025): the keys that are least like the mean unit key of their
    head. Looks at no attention, so that what is kept does not depend on the question."""
    choices = {"allocation": "uniform", "recent_fraction": 0.0}
    return Policy("keydiff", last_rows(1), unlikeness, choices=choices, key_value_stats=True)


def unlikeness(statistics: PromptStatistics) -> Tensor:
    """The negative cosine of each key to the mean unit key."""
    assert statistics.key_cosine is not None
    return -statistics.key_cosine
