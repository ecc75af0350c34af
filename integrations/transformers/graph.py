"""One decode step as one launch: captured in a CUDA graph, replayed over static buffers."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from vlcache_triton.pool.ragged import RaggedCache
from vlcache_triton.pool.rings import WindowRings

from .cache import VLCache
from .names import CACHE

# What a decode forward may be given besides its token and position: of use to the prompt only.
PROMPT_ONLY = {
    CACHE,
    "attention_mask",
    "image_grid_thw",
    "image_sizes",
    "logits_to_keep",
    "mm_token_type_ids",
    "return_dict",
    "second_per_grid_ts",
    "token_type_ids",
    "use_cache",
    "video_grid_thw",
}
MAX_LOANS = 4  # ragged caches kept for prompts to come; the oldest free one goes first


class StepBody(Protocol):
    """A decode step over static buffers of its own, which the caller fills before `run`."""

    def run(self) -> None:
        """Launch the step; no sync, nothing that depends on values."""


class Loan:
    """A ragged cache that a VLCache has for a while, and the steps captured over its tensors."""

    def __init__(self, ragged: RaggedCache, borrower: VLCache) -> None:
        self.ragged = ragged
        self.windows: WindowRings | None = None
        self.steps: dict[Hashable, Step] = {}
        self.lend_to(borrower)

    def lend_to(self, borrower: VLCache) -> None:
        """Hand the ragged cache to another VLCache."""
        self._borrower = weakref.ref(borrower)

    @property
    def borrower(self) -> VLCache | None:
        """Who has it; None where that cache is gone or has let go of it."""
        cache = self._borrower()
        return cache if cache is not None and cache.ragged in (None, self.ragged) else None


class Step:
    """A body that runs eagerly once, is captured the second time, and replayed from then on.

    It starts anew where the pools have moved, since a captured step reads where they were.
    """

    def __init__(self, body: StepBody, graphs: DecodeGraphs, ragged: RaggedCache) -> None:
        self.body, self.graphs, self.ragged = body, graphs, ragged
        self._pool: Tensor | None = None
        self._launch: Callable[[], None] | None = None

    def launch(self) -> None:
        """Run the step, one way or another."""
        if self._pool is not self.ragged.k:
            self._pool, self._launch = self.ragged.k, None
            self.body.run()  # compiles and warms up all that it calls
            return
        if self._launch is None:
            self._launch = self.graphs.capture(self.body.run)
        self._launch()


class DecodeGraphs:
    """The captured decode steps of one session, and the ragged caches that they read.

    A captured step is used again for later prompts whose capacities fall into the same bucket.
    Where tensors move at every step (beam search), every step is its first, and eager.

    device: of the model. On the CPU nothing can be captured, and a "captured" step is the call
        itself: the same code paths, for tests.
    can_capture: False keeps every step eager.
    num_captures: so far.
    """

    def __init__(self, device: torch.device, can_capture: bool) -> None:
        self.device, self.can_capture = device, can_capture
        self.num_captures = 0
        self._loans: list[Loan] = []
        self._lending = threading.Lock()  # threads of one session must not get the same

    def allocate(
        self, borrower: VLCache, capacity: int, max_seqlen_k: int, *shape: Any
    ) -> RaggedCache:
        """A ragged cache of bucketed size for `borrower`: a free one that fits, or a new one."""
        capacity, max_seqlen_k = round_up(capacity), round_up(max_seqlen_k)
        with self._lending:
            return self._lend(borrower, capacity, max_seqlen_k, *shape)

    def _lend(self, borrower: VLCache, *shape: Any) -> RaggedCache:
        free = [loan for loan in self._loans if loan.borrower is None]
        for loan in free:
            if loan.ragged.fits(*shape):
                loan.lend_to(borrower)
                return loan.ragged
        if free and len(self._loans) >= MAX_LOANS:
            self._loans.remove(free[0])
        self._loans.append(Loan(RaggedCache(*shape), borrower))
        return self._loans[-1].ragged

    def lend_windows(self, borrower: VLCache, *shape: Any) -> WindowRings:
        """Rings to go with the ragged cache that `borrower` has, kept for later prompts as well;
        arguments as for WindowRings."""
        loan = self._loan_of(borrower)
        assert loan is not None
        if loan.windows is None or not loan.windows.fits(*shape):
            loan.windows = WindowRings(*shape)
            loan.steps.clear()  # they read the rings from before
        return loan.windows

    def clear(self) -> None:
        """Give all memory back that nobody has borrowed."""
        self._loans.clear()

    def _loan_of(self, cache: VLCache) -> Loan | None:
        loan = next((x for x in self._loans if x.borrower is cache), None)
        return loan if loan is not None and loan.ragged is cache.ragged else None

    def step(self, cache: VLCache, key: Hashable, make: Callable[[Loan], StepBody]) -> Step | None:
        """The step called `key` over this cache, made where it is new; None without a loan."""
        loan = self._loan_of(cache)
        if loan is None:
            return None
        if key not in loan.steps:
            loan.steps[key] = Step(make(loan), self, loan.ragged)
        return loan.steps[key]

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` launches; what comes back launches it again, over the same memory."""
        if not self.can_capture:
            return run
        if self.device.type != "cuda":
            self.num_captures += 1
            return run
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
            return run
        self.num_captures += 1
        return graph.replay


class ForwardStep:
    """The body of a step of Transformers' own loop: a token in, logits out."""

    def __init__(self, loan: Loan, forward: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self.loan, self.forward = loan, forward
        self.input_ids = kwargs["input_ids"].clone()
        self.position_ids = kwargs["position_ids"].contiguous().clone()
        self.output_class: Any = None
        self.logits: Tensor | None = None

    def load(self, kwargs: dict[str, Any]) -> None:
        """Fill the static inputs."""
        self.input_ids.copy_(kwargs["input_ids"])
        self.position_ids.copy_(kwargs["position_ids"])

    def run(self) -> None:
        """The model's forward pass."""
        output = run_model(self.loan, self.forward, self.input_ids, self.position_ids)
        # Not the output itself: it would keep the cache alive.
        self.output_class, self.logits = type(output), output.logits


def run_model(
    loan: Loan, forward: Callable[..., Any], input_ids: Tensor, position_ids: Tensor
) -> Any:
    """One decode forward over the loan's cache."""
    return forward(
        input_ids=input_ids,
        position_ids=position_ids,
        use_cache=True,
        return_dict=True,
        **{CACHE: loan.borrower},
    )


def graphed_forward(graphs: DecodeGraphs, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward that replays plain decode steps over a VLCache, and is `forward` else."""

    @functools.wraps(forward)  # generate reads the signature
    def step_or_forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        if args or not isinstance(cache, VLCache) or not _is_plain_step(kwargs):
            return forward(*args, **kwargs)
        key = ("forward", kwargs["position_ids"].shape)
        step = graphs.step(cache, key, lambda loan: ForwardStep(loan, forward, kwargs))
        if step is None:
            return forward(**kwargs)
        body = step.body
        assert isinstance(body, ForwardStep)
        body.load(kwargs)
        step.launch()
        assert body.logits is not None
        return body.output_class(logits=body.logits.clone(), **{CACHE: cache})

    return step_or_forward


def _is_plain_step(kwargs: dict[str, Any]) -> bool:
    """One token a sequence, positions given, no gradients, nothing asked for but logits."""
    given = {name for name, x in kwargs.items() if x is not None and x is not False}
    return (
        given - PROMPT_ONLY == {"input_ids", "position_ids"}
        and kwargs["input_ids"].shape[1] == 1
        and not torch.is_grad_enabled()
    )


def round_up(rows: int) -> int:
    """The bucket of a capacity: the next multiple of an eighth of its power of two, at least 64.

    Prompts whose capacities fall into one bucket share captured steps; 12.5 % stay unused at most.
    """
    step = max(64, 1 << max(rows.bit_length() - 4, 0))
    return -(-rows // step) * step
