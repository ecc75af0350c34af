"""What host functions share when they launch: what a signature decides, the device, strides.

A call costs the host little more than Triton's own launch: all that dtypes, shapes, strides and
devices decide (checks, grids, strides, block sizes) is found out once for each signature.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from . import checks

T = TypeVar("T")
MAX_SIGNATURES = 1024  # remembered of each operation: prompts come in many lengths
NOTHING_TO_DO = nullcontext()


class Launch(dict[str, Any]):
    """What a signature decides of a launch: the grid, and every argument that is no tensor.

    `kernel.run(**launch, ...)` is `kernel[grid](...)` without a closure that packs the thirty
    arguments once more. First those that are many: the rest is then put to a copy of them.
    """

    def __init__(self, grid: tuple[int, ...], constants: dict[str, Any]) -> None:
        super().__init__(constants, grid=grid, warmup=False)


def once_per_signature(prepare: Callable[..., T]) -> Callable[..., T]:
    """Remember what `prepare` returns; what it raises is raised anew.

    It takes tensors (or None) by position and may look at their dtype, shape, strides and device
    alone; by keyword, values to remember it by.
    """
    known: dict[tuple, T] = {}

    @functools.wraps(prepare)
    def prepared(*tensors: Tensor | None, **values: Any) -> T:
        first = tensors[0]
        assert first is not None
        key = (
            # Whether the CPU will do may change.
            first.is_cuda or checks.interpreted(),
            *[x if x is None else (x.dtype, x.shape, x.stride(), x.device) for x in tensors],
            *values.values(),
        )
        found = known.get(key)
        if found is None:
            found = prepare(*tensors, **values)
            if len(known) >= MAX_SIGNATURES:
                known.clear()
            known[key] = found
        return found

    return prepared


def current(device: torch.device) -> AbstractContextManager:
    """A context where `device` is the current one, as the model may lie on several."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return NOTHING_TO_DO
    return torch.cuda.device(device)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for it: by pinned memory where it is a GPU."""
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def padded(head_size: int) -> int:
    """The head size as tiles have it: a power of two that a matrix product takes."""
    return max(16, triton.next_power_of_2(head_size))


def fp32_tile(head_size: int, nbytes: int) -> dict[str, int]:
    """Rows of a tile of so many bytes, where these are added up in fp32; one at least."""
    d = padded(head_size)
    return {"D": d, "ROWS": max(nbytes // (4 * d), 1)}


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 4 stands in for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def cache_constants(block_table: Tensor | None, **caches: Tensor) -> dict[str, Any]:
    """Of packed or paged rows by their names ("k", "v"), what kernels/addressing.py wants beside
    the tensors."""
    paged = block_table is not None
    first = next(iter(caches.values()))
    constants: dict[str, Any] = {
        "max_blocks": 0 if block_table is None else block_table.shape[1],
        "PAGE_SIZE": first.shape[1] if paged else 1,
    }
    for name, x in caches.items():
        constants[f"stride_{name}_page"] = x.stride(0) if paged else 0
        constants[f"stride_{name}_row"] = x.stride(-3)
        constants[f"stride_{name}_head"] = x.stride(-2)
    return constants
