"""What a policy is, and what it may look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..config import VLCacheConfig


@dataclass(frozen=True)
class PromptStatistics:
    """What was measured of one prompt of `length` tokens, in all layers; on the device.

    attention: `[num_layers, num_kv_heads, length]` fp32, what each token receives from the query
        rows: weighed, reduced and smoothed as policy and configuration say.
    is_visual: `[length]` bool, or None where the caller did not say.
    guide: as attention, from the guide rows: summed, averaged over the group, not smoothed.
    key_cosine: `[num_layers, num_kv_heads, length]` fp32, of each key to the mean unit key.
    mean_key_norm: `[num_layers, num_kv_heads]` fp32, of the mean unit key.
    value_norm: `[num_layers, num_kv_heads, length]` fp32, of each value.
    outside: `[num_layers, num_kv_heads, length]` fp32, the policy's own scores.

    What the policy did not ask for is None.
    """

    attention: Tensor
    is_visual: Tensor | None = None
    guide: Tensor | None = None
    key_cosine: Tensor | None = None
    mean_key_norm: Tensor | None = None
    value_norm: Tensor | None = None
    outside: Tensor | None = None


#: (post-vision rows, prompt length) -> how many of the last rows are the query rows.
QueryRows = Callable[[int, int], int]
#: How many query rows, and the attention that their own tokens receive from the guide rows, mean
#: over heads, `[rows]`, or None without guide rows -> what the attention of each counts, `[rows]`,
#: at least 0.
RowWeights = Callable[[int, Tensor | None], Tensor]
#: What was measured -> scores `[num_layers, num_kv_heads, length]` to rank tokens by.
Scoring = Callable[[PromptStatistics], Tensor]
#: Scores `[num_layers, num_kv_heads, length]` as ranked, what was measured, and the tokens that
#: each head of a layer would keep `[num_layers]` on the host -> tokens that each head keeps
#: `[num_layers, num_kv_heads]` on the host, of the same sum over all.
HeadSharing = Callable[[Tensor, PromptStatistics, Tensor], Tensor]
#: The layer's number, keys `[length, num_kv_heads, d]` after RoPE and values -> scores of one
#: prompt `[num_kv_heads, length]`.
OutsideScores = Callable[[int, Tensor, Tensor], Tensor]


def post_vision_rows(post_vision: int, length: int) -> int:
    """The post-vision rows (VL-Cache)."""
    return post_vision


@dataclass(frozen=True)
class Policy:
    """How the tokens of a prompt are ranked, and how its budget is shared out.

    Where its functions are a module's own, or partial ones of such, it can be pickled, and with it
    a cache that it has compressed.

    name: for tables.
    query_rows: the rows whose attention is measured, for scores and sparsity alike.
    score: what tokens are ranked by; None: the attention, as measured.
    share_heads: gives heads and layers other shares of the budget; None: what the configuration
        says of layers, and even shares of their heads.
    choices: fields of VLCacheConfig that the policy sets, whatever the user's are.
    row_weights: what the query rows count in the scores; None: all alike.
    guide_rows: last rows whose attention is measured before, for row_weights to go by; None: none.
    key_value_stats: whether the statistics of keys and values are measured.
    outside: scores of the policy's own for each layer, such as a trained gate's; None: none.
    made_for: the one model that it is for, as `VLCache.made_for` has it; None: any.
    """

    name: str
    query_rows: QueryRows = post_vision_rows
    score: Scoring | None = None
    share_heads: HeadSharing | None = None
    choices: Mapping[str, Any] = field(default_factory=dict)
    row_weights: RowWeights | None = None
    guide_rows: QueryRows | None = None
    key_value_stats: bool = False
    outside: OutsideScores | None = None
    made_for: str | None = None

    def configure(self, config: VLCacheConfig) -> VLCacheConfig:
        """The user's configuration with the fields that the policy sets."""
        return dataclasses.replace(config, **self.choices)
