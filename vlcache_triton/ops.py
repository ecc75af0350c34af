"""The one seam between the recipe and its arithmetic: Triton kernels or the fp32 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch

BackendName = Literal["auto", "triton", "reference"]


class Backend(NamedTuple):
    """The operations of reference.py, by one implementation."""

    name: str
    post_vision_stats: Callable
    select_tokens: Callable
    compact_kv: Callable
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
        from .kernels import reference

        return Backend("reference", *(getattr(reference, field) for field in Backend._fields[1:]))
    from .kernels.checks import interpreted

    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"backend: got 'triton' for a model on {device}, expected a CUDA device"
            " (or TRITON_INTERPRET=1, set before Triton is imported)"
        )
    from .kernels.compact import compact_kv
    from .kernels.decode import append_kv, varlen_decode
    from .kernels.remainder import store_means, sum_evicted
    from .kernels.score import post_vision_stats
    from .kernels.select import select_tokens

    return Backend(
        "triton",
        post_vision_stats,
        select_tokens,
        compact_kv,
        sum_evicted,
        store_means,
        varlen_decode,
        append_kv,
    )
