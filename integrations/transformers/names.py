"""How the installed Transformers is spoken to: what it calls the KV cache, as seen in it and not
told by its version, and how its forward passes are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

# The argument of forward passes, and the key of their outputs, that is a `Cache`:
# `past_key_values` up to 5.23, `cache` from 5.24 on.
CACHE = next(
    (
        name
        for name, parameter in inspect.signature(
            GenerationMixin.prepare_inputs_for_generation
        ).parameters.items()
        if "Cache" in str(parameter.annotation)
    ),
    "cache",
)
CACHE_NAMES = {CACHE, "cache", "past_key_values"}
# What a decode forward may be given besides its token and position: of use to the prompt only. Some
# models hand all of it down to their attention.
PROMPT_ONLY = {
    CACHE,
    "attention_mask",
    "image_grid_thw",
    "image_sizes",
    "logits_to_keep",
    "mm_token_type_ids",
    "return_dict",
    "second_per_grid_ts",
    "spatial_shapes",
    "token_type_ids",
    "use_cache",
    "video_grid_thw",
}


def rename_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the cache under the name that is Transformers' own, by whichever it was given.

    Raises:
        ValueError: for a cache by two names.
    """
    given = sorted(name for name in CACHE_NAMES if kwargs.get(name) is not None)
    if len(given) > 1:
        raise ValueError(f"{given[0]}: got {given[1]} as well, expected one of them")
    renamed = {name: x for name, x in kwargs.items() if name not in CACHE_NAMES}
    if given:
        renamed[CACHE] = kwargs[given[0]]
    return renamed


def named_arguments(function: Callable[..., Any], args: tuple, kwargs: dict) -> dict[str, Any]:
    """All arguments of a call by their names, the cache by the one that Transformers gives it."""
    if args:
        kwargs = {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}
    return rename_cache(kwargs)


def decode_forward(
    forward: Callable[..., Any], cache: Any, input_ids: Tensor, position_ids: Tensor
) -> Any:
    """A model's forward pass of one decode step over a cache."""
    return forward(
        input_ids=input_ids,
        position_ids=position_ids,
        use_cache=True,
        return_dict=True,
        **{CACHE: cache},
    )


def prefill_logits(model: Any, input_ids: Tensor, config: Any, kwargs: dict[str, Any]) -> Tensor:
    """The prompt's pass as `generate` does it; its last row's logits `[num_seqs, vocab_size]`."""
    return model._prefill(input_ids, config, kwargs).logits[:, -1]
