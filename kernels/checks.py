"""Checks that the host functions share: an error names the argument, what was got, what was due."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HEAD_SIZES = (64, 80, 96, 128, 256)


def expect(ok: bool, name: str, got: object, expected: str) -> None:
    """Raise ValueError unless ok."""
    if not ok:
        raise ValueError(f"{name}: got {got}, expected {expected}")


def expect_float(name: str, x: Tensor) -> None:
    """fp16, bf16 or fp32 with a contiguous last dimension; fp8 and the rest are refused."""
    if x.dtype not in FLOATS:
        raise NotImplementedError(f"{name}: got dtype {x.dtype}, expected one of {FLOATS}")
    expect(x.stride(-1) == 1, name, f"stride {x.stride(-1)} in the last dimension", "1")


def expect_int32(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """A contiguous int32 tensor of that shape."""
    expect(x.dtype == torch.int32, name, f"dtype {x.dtype}", "torch.int32")
    expect(tuple(x.shape) == shape, name, f"shape {tuple(x.shape)}", f"{shape}")
    expect(x.is_contiguous(), name, f"strides {x.stride()}", "a contiguous tensor")


def expect_same_device(**tensors: Tensor | None) -> None:
    """All given tensors on one device, which can run Triton: CUDA, or the CPU interpreter."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first, device = next((name, x.device) for name, x in given.items())
    for name, x in given.items():
        expect(x.device == device, name, f"device {x.device}", f"{device}, as {first}")
    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"{first}: got device {device}, expected a CUDA device"
            " (or TRITON_INTERPRET=1, set before Triton is imported, to run on the CPU)"
        )


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU; it knows which values of TRITON_INTERPRET say so."""
    return triton.knobs.runtime.interpret


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 4 stands in for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def expect_paged_or_packed(name: str, x: Tensor, paged: bool) -> None:
    """Pages where there is a block table, else packed rows."""
    layout = "[num_blocks, page_size, num_kv_heads, d]" if paged else "[total_k, num_kv_heads, d]"
    expect(x.dim() == (4 if paged else 3), name, f"shape {tuple(x.shape)}", layout)


def padded(head_size: int) -> int:
    """The head size as tiles have it: a power of two that a matrix product takes."""
    return max(16, triton.next_power_of_2(head_size))
