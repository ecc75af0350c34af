"""What host functions share when they launch: the tile of a head, the device, a cache's strides."""

from __future__ import annotations

import torch
import triton
from torch import Tensor


def padded(head_size: int) -> int:
    """The head size as tiles have it: a power of two that a matrix product takes."""
    return max(16, triton.next_power_of_2(head_size))


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 4 stands in for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def cache_arguments(block_table: Tensor | None, **caches: Tensor) -> dict[str, object]:
    """Packed or paged rows by their names ("k", "v"), as kernels/addressing.py wants them."""
    paged = block_table is not None
    first = next(iter(caches.values()))
    arguments: dict[str, object] = {
        "block_table_ptr": block_table,
        "max_blocks": 0 if block_table is None else block_table.shape[1],
        "PAGE_SIZE": first.shape[1] if paged else 1,
    }
    for name, x in caches.items():
        arguments[f"{name}_ptr"] = x
        arguments[f"stride_{name}_page"] = x.stride(0) if paged else 0
        arguments[f"stride_{name}_row"] = x.stride(-3)
        arguments[f"stride_{name}_head"] = x.stride(-2)
    return arguments
