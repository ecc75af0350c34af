"""A door for scores from outside, such as those of trained gates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .policy import OutsideScores, Policy, PromptStatistics
from .rows import last_rows


def outside_scores(scores: OutsideScores, name: str = "outside", **choices: Any) -> Policy:
    """Ranks tokens by a function of your own.

    Args:
        scores: `scores(layer, keys, values)`, called for each prompt and layer while the prompt is
            read: the layer's number among the compressed ones, keys `[length, num_kv_heads, d]`
            after RoPE and values `[length, num_kv_heads, d_v]`, without pads, to be read only. It
            returns `[num_kv_heads, length]` on their device, the higher the more worth keeping,
            without NaN.
        name: for tables.
        choices: fields of VLCacheConfig that the policy sets, such as `recent_fraction=0.0`.
    """
    return Policy(name, last_rows(1), _as_given, choices=choices, outside=scores)


def _as_given(statistics: PromptStatistics) -> Tensor:
    assert statistics.outside is not None
    return statistics.outside
