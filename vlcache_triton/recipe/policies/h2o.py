"""H2O (https://arxiv.org/abs/2306.14048)."""

from __future__ import annotations

from .policy import Policy
from .rows import all_rows


def h2o() -> Policy:
    """H2O (Zhang et al., NeurIPS 2023): attention summed over all rows; half the budget recent."""
    choices = {"allocation": "uniform", "recent_fraction": 0.5}
    return Policy("h2o", all_rows, choices=choices)
