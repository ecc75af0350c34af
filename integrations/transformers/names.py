"""What the installed Transformers calls the KV cache: seen in it, not told by its version."""

from __future__ import annotations

import inspect
from typing import Any

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
