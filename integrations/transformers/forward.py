"""A model's forward that replays captured decode steps: the body of Transformers' own loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cache import VLCache
from .graph import DecodeGraphs
from .names import CACHE, PROMPT_ONLY, decode_forward


class ForwardStep:
    """The body of a step of Transformers' own loop: a token in, logits out."""

    def __init__(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self.forward = forward
        self.input_ids = kwargs["input_ids"].clone()
        self.position_ids = kwargs["position_ids"].contiguous().clone()
        self.output_class: Any = None
        self.logits: Tensor | None = None

    def load(self, kwargs: dict[str, Any]) -> None:
        """Fill the static inputs."""
        self.input_ids.copy_(kwargs["input_ids"])
        self.position_ids.copy_(kwargs["position_ids"])

    def run(self, cache: VLCache) -> None:
        """The model's forward pass."""
        output = decode_forward(self.forward, cache, self.input_ids, self.position_ids)
        # Not the output itself: it would keep the cache alive.
        self.output_class, self.logits = type(output), output.logits


def graphed_forward(graphs: DecodeGraphs, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward that replays plain decode steps over a VLCache, and is `forward` else."""

    @functools.wraps(forward)  # generate reads the signature
    def step_or_forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        if args or not isinstance(cache, VLCache) or not _is_plain_step(kwargs):
            return forward(*args, **kwargs)
        packed = cache.packed
        if packed is None:
            return forward(**kwargs)
        key = "forward", kwargs["position_ids"].shape
        step = graphs.step(packed.ragged, key, lambda: ForwardStep(forward, kwargs))
        step.body.load(kwargs)
        step.launch(packed.places, functools.partial(step.body.run, cache))
        assert step.body.logits is not None
        return step.body.output_class(logits=step.body.logits.clone(), **{CACHE: cache})

    return step_or_forward


def _is_plain_step(kwargs: dict[str, Any]) -> bool:
    """One token a sequence, positions given, no gradients, nothing asked for but logits."""
    given = {name for name, x in kwargs.items() if x is not None and x is not False}
    return (
        given - PROMPT_ONLY == {"input_ids", "position_ids"}
        and kwargs["input_ids"].shape[1] == 1
        and not torch.is_grad_enabled()
    )
