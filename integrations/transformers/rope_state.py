"""What models of M-RoPE note on themselves: how far a prompt's positions lag behind its length.

Transformers keeps that on the model, for the latest prompt alone; here it goes with the cache.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from .cache import VLCache


class RopeState:
    """The `rope_deltas` of a model, `[num_seqs, 1]` in each module that has them; else nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        modules = model.modules()
        self._holders: list[Any] = [x for x in modules if hasattr(x, "rope_deltas")]

    def noted(self) -> tuple[Tensor | None, ...]:
        """Of the pass that has ended: what its cache remembers."""
        return tuple(holder.rope_deltas for holder in self._holders)

    def recall(self, cache: VLCache) -> None:
        """Before a pass that goes on from what is in the cache; where that is nothing, no other
        prompt's are left."""
        for holder, deltas in zip_longest(self._holders, cache.rope_deltas):
            if holder.rope_deltas is not deltas:
                holder.rope_deltas = deltas
