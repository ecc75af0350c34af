"""One decode step as one launch: captured in a CUDA graph, replayed over static buffers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

Body = TypeVar("Body")


class Step(Generic[Body]):
    """A step that runs eagerly once, is captured the second time, and replayed from then on.

    It starts anew where memory has moved, since a captured step reads where that was.

    body: the static buffers of the step, and what it does with them.
    """

    def __init__(self, body: Body, graphs: DecodeGraphs) -> None:
        self.body, self._graphs = body, graphs
        self._places: tuple[Tensor, ...] = ()
        self._is_captured = False
        self._replay: Callable[[], None] | None = None

    def launch(self, places: tuple[Tensor, ...], run: Callable[[], None]) -> None:
        """Run the step, one way or another.

        Args:
            places: tensors outside the body that the step reads where they are.
            run: launches the step: no sync, nothing that depends on values. It is not kept.
        """
        if [*map(id, places)] != [*map(id, self._places)]:
            self._places, self._is_captured, self._replay = places, False, None
            run()  # compiles and warms up all that it calls
            return
        if not self._is_captured:
            self._is_captured, self._replay = True, self._graphs.capture(run)
        (self._replay or run)()


class DecodeGraphs:
    """The captured decode steps of one session.

    Steps belong to the memory that they read, whatever it is, and live as long as it does. Where
    tensors move at every step (beam search), every step is its first, and eager.

    device: of the model. On the CPU nothing can be captured, and a "captured" step is the call
        itself: the same code paths, for tests.
    can_capture: False keeps every step eager.
    num_captures: so far.
    """

    def __init__(self, device: torch.device, can_capture: bool) -> None:
        self.device, self.can_capture = device, can_capture
        self.num_captures = 0
        self._steps: WeakKeyDictionary[Any, dict[Hashable, Step]] = WeakKeyDictionary()

    def step(self, memory: object, key: Hashable, make: Callable[[], Body]) -> Step[Body]:
        """The step called `key` over this memory, its body made where it is new."""
        steps = self._steps.setdefault(memory, {})
        if key not in steps:
            steps[key] = Step(make(), self)
        return steps[key]

    def clear(self) -> None:
        """Let all steps go, and what the graphs hold of the device's memory."""
        self._steps.clear()

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """Record what `run` launches; what comes back launches it again, over the same memory.
        None where that cannot be done."""
        if not self.can_capture:
            return None
        if self.device.type != "cuda":
            self.num_captures += 1
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            self.can_capture = False
            warnings.warn(
                f"cuda_graph: a decode step could not be captured, decoding eagerly: {error}",
                stacklevel=2,
            )
            return None
        self.num_captures += 1
        return graph.replay
