"""The kernels by name, and the one seam between the recipe and its arithmetic: those or torch.

Under torch.compile each is an operator of torch.library: one node, without a graph break.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch

from .kernels import operators, reference
from .kernels.checks import interpreted
from .kernels.operators import (
    append_kv,
    compact_kv,
    compact_kv_,
    compact_layers,
    kept_descales,
    key_value_stats,
    post_vision_stats,
    select_tokens,
    store_means,
    sum_evicted,
    varlen_decode,
)

__all__ = [
    "Backend",
    "BackendName",
    "append_kv",
    "compact_kv",
    "compact_kv_",
    "compact_layers",
    "get_backend",
    "kept_descales",
    "key_value_stats",
    "post_vision_stats",
    "select_tokens",
    "store_means",
    "sum_evicted",
    "varlen_decode",
]

BackendName = Literal["auto", "triton", "reference"]


class Backend(NamedTuple):
    """The operations of reference.py, by one implementation."""

    name: str
    post_vision_stats: Callable
    key_value_stats: Callable
    select_tokens: Callable
    compact_kv: Callable
    compact_layers: Callable
    kept_descales: Callable
    sum_evicted: Callable
    store_means: Callable
    varlen_decode: Callable
    append_kv: Callable


def get_backend(name: BackendName, device: torch.device) -> Backend:
    """The operations that serve tensors on `device`.

    Args:
        name: "auto" is Triton on CUDA and the reference elsewhere; "triton" on the CPU needs
            TRITON_INTERPRET=1, set before Triton is imported. Nothing falls back silently.

    Raises:
        ValueError: for an unknown name, or Triton where it cannot run.
    """
    if name not in get_args(BackendName):
        raise ValueError(f"backend: got {name!r}, expected one of {get_args(BackendName)}")
    if name == "reference" or (name == "auto" and device.type != "cuda"):
        return _backend("reference", reference)
    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"backend: got 'triton' for a model on {device}, expected a CUDA device"
            " (or TRITON_INTERPRET=1, set before Triton is imported)"
        )
    return _backend("triton", operators)


def _backend(name: str, module: ModuleType) -> Backend:
    return Backend(name, *(getattr(module, field) for field in Backend._fields[1:]))
