"""One number of a table, wherever it comes from: our own items, or lmms-eval."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..evaluation import summarise


class Score(NamedTuple):
    """How well a task is done. metric: its name; value: more is better; low, high: its 95 %
    interval, None where that is not known."""

    task: str
    variant: str
    budget: float
    metric: str
    value: float
    low: float | None
    high: float | None


def scores_of(results: Iterable[dict[str, Any]]) -> list[Score]:
    """Exact matches by task and in the mean of the tasks, of what `evaluate_item` returns."""
    return [
        Score(c.suite, c.variant, c.budget, "exact match", c.exact, c.exact_low, c.exact_high)
        for c in summarise(results)
    ]
