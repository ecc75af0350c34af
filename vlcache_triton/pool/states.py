"""States of constant size: what linear, convolution and Mamba layers keep of all they have seen.

They pass through uncompressed. Their layers change them in place at every step, and nothing leads
back to what they were before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def state_shapes(states: Sequence[Tensor]) -> tuple[StateShape, ...]:
    """What would make others of these sizes."""
    return tuple(StateShape(tuple(x.shape), x.dtype, x.device) for x in states)


@dataclass(frozen=True)
class StateShape:
    """Of one state, `[num_seqs, ...]`."""

    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class LayerStates:
    """The states of all such layers of one cache: captured steps read and write them in place.

    tensors: `[num_seqs, ...]` each.
    """

    def __init__(self, shape: Sequence[StateShape]) -> None:
        self.tensors = [torch.zeros(x.sizes, dtype=x.dtype, device=x.device) for x in shape]

    @property
    def shape(self) -> tuple[StateShape, ...]:
        """What would make others of these sizes."""
        return state_shapes(self.tensors)

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Become a copy of states of the same sizes, in place: as a prompt's pass has left them."""
        for mine, its in zip(self.tensors, tensors, strict=True):
            mine.copy_(its)

    def select_sequences(self, indices: Tensor) -> None:
        """Make sequence i what sequence indices[i] was; new tensors."""
        self.tensors = [x[indices.to(x.device)] for x in self.tensors]
