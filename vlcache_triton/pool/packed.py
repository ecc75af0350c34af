"""A packed cache: all that decode steps read and write, and the count of what it has seen."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from .allocator import PoolAllocator
from .ragged import RaggedCache
from .rings import WindowRings
from .states import LayerStates


class PackedCache:
    """What is kept of a prompt, and the tokens behind it.

    ragged: of the layers that are compressed; to be set before anything else is done.
    rings: of the layers with a window, where captured steps are to read them; None where there is
        no such layer, or their rows are elsewhere.
    states: of the layers with a state, likewise.
    pads: left pads of each sequence.
    num_seen: tokens of every sequence, with pads and all that was evicted.
    step_rows: rows a sequence of the pass that is running; 0 between passes.
    """

    ragged: RaggedCache

    def __init__(self, pads: Sequence[int], num_seen: int) -> None:
        self.rings: WindowRings | None = None
        self.states: LayerStates | None = None
        self.pads, self.num_seen, self.step_rows = tuple(pads), num_seen, 0

    @property
    def places(self) -> tuple[Tensor, ...]:
        """What a captured step reads where it is, one tensor for all that move together: others
        once memory has moved."""
        rings = [] if self.rings is None else [self.rings.k]
        states = [] if self.states is None else self.states.tensors[:1]
        return (self.ragged.k, *rings, *states)

    def begin_step(self, num_rows: int) -> None:
        """Announce a forward pass of `num_rows` tokens a sequence."""
        self.ragged.reserve(num_rows)
        if self.rings is not None:
            self.rings.advance(self.num_seen, num_rows)
        self.step_rows = num_rows

    def check_rows(self, num_rows: int) -> None:
        """Refuse rows that nobody announced: the attention would not see the cache either."""
        if num_rows != self.step_rows:
            raise RuntimeError(
                f"VLCache: got {num_rows} rows in a step of {self.step_rows}, expected a forward"
                " pass inside the vl_cache block"
            )

    def end_step(self) -> None:
        """Count the rows of the pass that was announced: once, for all layers."""
        self.ragged.room -= self.step_rows
        self.num_seen += self.step_rows
        self.step_rows = 0

    @property
    def can_take_back(self) -> bool:
        """Whether rows can be forgotten: nothing leads back from a state."""
        return self.states is None or not self.states.tensors

    def take_back(self, num_rows: int) -> None:
        """Forget the last rows of every sequence: of steps that had run past the answer's end."""
        if num_rows > 0:
            assert self.can_take_back
            self.ragged.seqused_k -= num_rows
            self.ragged.room += num_rows
            self.num_seen -= num_rows
            if self.rings is not None:
                self.rings.take_back(self.num_seen)

    def select_sequences(self, indices: Tensor) -> None:
        """Make sequence i what sequence indices[i] was."""
        if self.rings is not None:
            self.rings.select_sequences(indices)
        if self.states is not None:
            self.states.select_sequences(indices)
        self.ragged.select_sequences(indices)
        self.pads = tuple(self.pads[i] for i in indices.tolist())

    def copy_into(self, allocator: PoolAllocator) -> PackedCache:
        """The same in memory that the allocator lends; between passes."""
        other = PackedCache(self.pads, self.num_seen)
        other.ragged = self.ragged.copy(functools.partial(allocator.allocate, owner=other))
        if self.rings is not None:
            rings: WindowRings = allocator.attach(WindowRings, self.rings.shape, other)
            rings.copy_from(self.rings)
            other.rings = rings
        if self.states is not None:
            states: LayerStates = allocator.attach(LayerStates, self.states.shape, other)
            states.fill(self.states.tensors)
            other.states = states
        return other
