"""One image, many questions: what is kept before any of them is known."""

from __future__ import annotations

from torch import Tensor

from .keydiff import unlikeness
from .policy import Policy, PromptStatistics
from .rows import last_rows


def query_agnostic() -> Policy:
    """A preset of this package, after KeyDiff and MixKV: the tokens whose keys are unlike the mean
    key of their head and whose values are long, and a row for all that is evicted. Attention is not
    looked at, since the rows that will ask are still to come.

    Compress a prompt that ends with its image, and ask on copies of its cache (docs/policies.md).
    """
    return Policy(
        "query_agnostic",
        last_rows(1),
        distinct_and_long,
        choices={"allocation": "uniform", "recent_fraction": 0.0, "remainder": "mean"},
        key_value_stats=True,
    )


def distinct_and_long(statistics: PromptStatistics) -> Tensor:
    """(1 - cosine to the mean unit key) * value norm."""
    assert statistics.value_norm is not None
    return (1 + unlikeness(statistics)) * statistics.value_norm
