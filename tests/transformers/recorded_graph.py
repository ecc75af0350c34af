"""CUDA graphs' semantics on the CPU: a step's operations are recorded once, then replayed as such.

As on a GPU, nothing takes effect while recording, no Python of the model runs in a replay, every
replay reads and writes the memory that was recorded, and what would wait for the device (values
read by the host, shapes that depend on values) is an error. Memory of the step's own is poisoned
between replays, as a graph's memory pool may be used by others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlcache_triton.integrations.transformers import Session
from vlcache_triton.kernels import reference

aten = torch.ops.aten
SYNCS = (
    aten._local_scalar_dense,
    aten.nonzero,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten._unique2,
)


class RecordedGraph:
    """Stands for torch.cuda.CUDAGraph.

    num_replays: of all graphs, to be reset by whoever counts.
    """

    num_replays = 0

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.own: dict[int, torch.UntypedStorage] = {}  # memory first used by the step

    def replay(self) -> None:
        RecordedGraph.num_replays += 1
        for storage in self.own.values():
            storage.fill_(255)
        for function, args, kwargs, made in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tensors(made), tensors(again), strict=True):
                if address(old) != address(new):  # neither a view nor written in place
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    """Notes every operation, and the memory from before that they are about to change."""

    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            function.overloadpacket in SYNCS
            or self._indexes_by_mask(function, args)
            or self._copies_from_the_host(function, args)
        ):
            raise RuntimeError(f"{function}: operation not permitted when stream is capturing")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._save(value)
        for argument in function._schema.arguments:
            if argument.kwarg_only and argument.alias_info is not None and argument.name in kwargs:
                self._save(kwargs[argument.name])
        made = function(*args, **kwargs)
        given = {address(x) for x in tensors((args, kwargs))}
        new = {address(x): x.untyped_storage() for x in tensors(made)}
        self.graph.own |= {key: new[key] for key in new.keys() - given}
        self.graph.calls.append((function, args, kwargs, made))
        return made

    @staticmethod
    def _indexes_by_mask(function, args) -> bool:
        by_index = function.overloadpacket in (aten.index, aten.index_put, aten.index_put_)
        return by_index and any(x.dtype == torch.bool for x in tensors(args[1]))

    @staticmethod
    def _copies_from_the_host(function, args) -> bool:
        """torch.tensor of a list; `x[i] = number` lifts a number, which is a kernel's argument."""
        return function.overloadpacket is aten.lift_fresh and args[0].dim() > 0

    def _save(self, value: Tensor) -> None:
        for x in tensors(value):
            storage, key = x.untyped_storage(), address(x)
            if key not in self.graph.own and key not in self._before:
                self._before[key] = storage, storage.clone()

    def undo(self) -> None:
        """Put back what the recording has changed."""
        for storage, before in self._before.values():
            storage.copy_(before)


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@contextmanager
def record(graph: RecordedGraph) -> Iterator[None]:
    """Stands for torch.cuda.graph."""
    recorder, generator_state = Recorder(graph), torch.get_rng_state()
    try:
        with recorder:
            yield
    finally:
        recorder.undo()
        torch.set_rng_state(generator_state)


@contextmanager
def recorded_graphs(session: Session) -> Iterator[None]:
    """Captures of this session are recordings; the session believes itself on a GPU."""
    RecordedGraph.num_replays = 0
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "CUDAGraph", RecordedGraph))
        stack.enter_context(mock.patch.object(torch.cuda, "graph", record))
        stack.enter_context(mock.patch.object(reference, "append_kv", append_kv))
        stack.enter_context(mock.patch.object(session.graphs, "device", torch.device("cuda")))
        yield


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor,
    *,
    block_table: None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """reference.append_kv without a mask (its indices), where every row has room."""
    position = torch.arange(k.shape[1]) + (cu_seqlens_k[:-1] + seqused_k)[:, None]
    for new, cache, descale in ((k, k_cache, k_descale), (v, v_cache, v_descale)):
        if descale is not None:
            new = (new / descale[:, None, :, None]).clamp(-448, 448).to(cache.dtype)
        cache[position.long()] = new
    seqused_k += k.shape[1]
