"""Memory of packed caches, lent by shape and used again: captured steps find it where it was."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import Any

from ..ops import Backend
from .ragged import RaggedCache
from .shape import PoolShape

MAX_POOLS = 4  # kept for prompts to come; the oldest free one goes first


class _Pool:
    """A ragged cache, the memory of other kinds that goes with it, and whose they are."""

    def __init__(self, ragged: RaggedCache) -> None:
        self.ragged = ragged
        self.parts: dict[Any, Any] = {}
        self.owner: Callable[[], object | None] = lambda: None


class PoolAllocator:
    """Lends memory to owners, and has it back as soon as an owner is gone.

    An owner may be any object that can be referred to weakly: nothing is asked of it.
    """

    def __init__(self) -> None:
        self._pools: list[_Pool] = []
        self._lending = threading.Lock()  # threads must not get the same

    def allocate(self, shape: PoolShape, backend: Backend, owner: object) -> RaggedCache:
        """A ragged cache of this shape, its sizes rounded up: a free one, or a new one."""
        capacity, max_seqlen_k = round_up(shape.capacity), round_up(shape.max_seqlen_k)
        shape = dataclasses.replace(shape, capacity=capacity, max_seqlen_k=max_seqlen_k)
        with self._lending:
            pool = self._free_pool(shape, backend)
            pool.owner = weakref.ref(owner)
        return pool.ragged

    def _free_pool(self, shape: PoolShape, backend: Backend) -> _Pool:
        free = [pool for pool in self._pools if pool.owner() is None]
        for pool in free:
            if (pool.ragged.shape, pool.ragged.backend) == (shape, backend):
                return pool
        if free and len(self._pools) >= MAX_POOLS:
            self._pools.remove(free[0])
        self._pools.append(_Pool(RaggedCache(shape, backend)))
        return self._pools[-1]

    def attach(self, make: Callable[[Any], Any], shape: Any, owner: object) -> Any:
        """Memory of another kind, which goes with what its owner has been lent: what is there of
        this `shape`, which it tells itself, else what `make` makes of it."""
        pool = next(x for x in self._pools if x.owner() is owner)
        if make not in pool.parts or pool.parts[make].shape != shape:
            pool.parts[make] = make(shape)
        return pool.parts[make]

    def forget(self, owner: object) -> None:
        """Lend what this owner has to nobody after it."""
        self._pools = [pool for pool in self._pools if pool.owner() is not owner]

    def clear(self) -> None:
        """Keep nothing: what is lent goes with its owners."""
        self._pools.clear()


def round_up(rows: int) -> int:
    """The bucket of a capacity: the next multiple of an eighth of its power of two, at least 64.

    Prompts whose capacities fall into one bucket share captured steps; 12.5 % stay unused at most.
    """
    step = max(64, 1 << max(rows.bit_length() - 4, 0))
    return -(-rows // step) * step
