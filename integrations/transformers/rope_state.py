"""What models of M-RoPE note on themselves: how far a prompt's positions lag behind its length.

Transformers keeps that on the model, for the latest prompt alone; here it goes with the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


class RopeState:
    """The `rope_deltas` of a model, `[num_seqs, 1]` in each module that has them; else nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        modules = model.modules()
        self._holders: list[Any] = [x for x in modules if hasattr(x, "rope_deltas")]

    def noted(self) -> tuple[Tensor | None, ...]:
        """Of the pass that has ended: what its cache remembers."""
        return tuple(holder.rope_deltas for holder in self._holders)

    def recall(self, noted: Sequence[Tensor | None]) -> None:
        """Before a pass that goes on from what is in a cache, with what that remembers; where it
        is nothing, no other prompt's are left."""
        for holder, deltas in zip_longest(self._holders, noted):
            if holder.rope_deltas is not deltas:
                holder.rope_deltas = deltas
