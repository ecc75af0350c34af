"""Checks that the host functions share: an error names the argument, what was got, what was due."""

from __future__ import annotations

import os

import torch
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
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{first}: got device {device}, expected a CUDA device"
            " (or TRITON_INTERPRET=1, set before Triton is imported, to run on the CPU)"
        )


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 4 stands in for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
