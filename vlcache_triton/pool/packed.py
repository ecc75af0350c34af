"""A packed cache: all that decode steps read and write, and the count of what it has seen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..recipe.turn import Eviction
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
    later_pads: of later passes that had pads among their rows: how many tokens came before, and
        which rows were pads, `[num_seqs, n]` bool on the host. They are in no segment.
    num_seen: tokens of every sequence, with pads and all that was evicted.
    step_rows: rows a sequence of the pass that is running; 0 between passes.
    step_pads: `[num_seqs]` int64 on the device, pads among them; None where there are none.
    step_order: `[num_seqs, n]` int64 on the device, its rows with pads first; None where they are.
    """

    ragged: RaggedCache

    def __init__(self, pads: Sequence[int], num_seen: int) -> None:
        self.rings: WindowRings | None = None
        self.states: LayerStates | None = None
        self.pads, self.num_seen, self.step_rows = tuple(pads), num_seen, 0
        self.later_pads: list[tuple[int, Tensor]] = []
        self.step_pads: Tensor | None = None
        self.step_order: Tensor | None = None

    @property
    def places(self) -> tuple[Tensor, ...]:
        """What a captured step reads where it is, one tensor for all that move together: others
        once memory has moved."""
        rings = [] if self.rings is None else [self.rings.k]
        states = [] if self.states is None else self.states.tensors[:1]
        return (self.ragged.k, *rings, *states)

    @property
    def num_pads(self) -> list[int]:
        """Of each sequence, wherever they are."""
        later = [is_pad.sum(1) for _, is_pad in self.later_pads]
        return torch.stack([torch.tensor(self.pads), *later]).sum(0).tolist()

    def is_real(self) -> Tensor:
        """`[num_seqs, num_seen]` bool on the host, False on pads: the mask of all passes."""
        real = torch.arange(self.num_seen) >= torch.tensor(self.pads)[:, None]
        for start, is_pad in self.later_pads:
            real[:, start : start + is_pad.shape[1]] = ~is_pad
        return real

    def begin_step(self, num_rows: int, is_pad: Tensor | None = None) -> None:
        """Announce a forward pass of `num_rows` tokens a sequence.

        Args:
            is_pad: `[num_seqs, num_rows]` bool on the host, True on rows that are pads.
        """
        self.step_pads = self.step_order = None
        if is_pad is not None:
            self.later_pads.append((self.num_seen, is_pad))
            order = pads_first(is_pad)
            self.step_pads = is_pad.sum(1).to(self.ragged.k.device)
            if order is not None:
                self.step_order = order.to(self.ragged.k.device)
        self.ragged.reserve(num_rows)
        if self.rings is not None:
            self.rings.advance(self.num_seen, num_rows, self.step_pads)
        self.step_rows = num_rows

    def in_order(self, rows: Tensor) -> Tensor:
        """Rows of the pass `[num_seqs, heads, n, d]`, pads first."""
        order = self.step_order
        return rows if order is None else rows.take_along_dim(order[:, None, :, None], 2)

    def as_read(self, rows: Tensor) -> Tensor:
        """Rows `[num_seqs, n, heads, d]` that are in that order, as the pass has them."""
        if self.step_order is None:
            return rows
        order = self.step_order[:, :, None, None].expand_as(rows)
        return torch.empty_like(rows).scatter_(1, order, rows)

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
        self.step_rows, self.step_pads, self.step_order = 0, None, None

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
                self.rings.take_back(num_rows)

    def select_sequences(self, indices: Tensor) -> None:
        """Make sequence i what sequence indices[i] was."""
        if self.rings is not None:
            self.rings.select_sequences(indices)
        if self.states is not None:
            self.states.select_sequences(indices)
        self.ragged.select_sequences(indices)
        self.pads = tuple(self.pads[i] for i in indices.tolist())
        self.later_pads = [(at, is_pad[indices.cpu()]) for at, is_pad in self.later_pads]

    def copy_into(self, allocator: PoolAllocator) -> PackedCache:
        """The same in memory that the allocator lends; between passes."""
        return self._moved(self.ragged.copy, allocator)

    def evict(
        self,
        eviction: Eviction,
        room: int,
        allocator: PoolAllocator | None = None,
        *,
        is_fp8: bool = False,
    ) -> PackedCache:
        """What stays, with `room` free rows a segment; between passes. This cache is of no use any
        more, and its memory, which had grown by the pass, is not lent again."""
        evict = functools.partial(self.ragged.evict, eviction, room, is_fp8=is_fp8)
        other = self._moved(evict, allocator)
        if allocator is not None:
            allocator.forget(self)
        return other

    def _moved(
        self, move: Callable[..., RaggedCache], allocator: PoolAllocator | None
    ) -> PackedCache:
        other = PackedCache(self.pads, self.num_seen)
        other.later_pads = list(self.later_pads)
        if allocator is None:
            other.ragged, other.rings, other.states = move(), self.rings, self.states
            return other
        other.ragged = move(functools.partial(allocator.allocate, owner=other))
        if self.rings is not None:
            rings: WindowRings = allocator.attach(WindowRings, self.rings.shape, other)
            rings.copy_from(self.rings)
            other.rings = rings
        if self.states is not None:
            states: LayerStates = allocator.attach(LayerStates, self.states.shape, other)
            states.fill(self.states.tensors)
            other.states = states
        return other


def pads_first(is_pad: Tensor) -> Tensor | None:
    """The order of rows `[num_seqs, n]` that puts pads first and leaves the others as they are;
    None where they are in it."""
    order = torch.argsort((~is_pad).long(), dim=1, stable=True)
    return None if torch.equal(order, torch.arange(is_pad.shape[1]).expand_as(order)) else order
