"""One device for all kernel tests, poisoned fresh memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA where there is one, else the CPU with Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty hands out NaN and the largest integers, so nothing can rely on fresh zeros."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def interpreted_bfloat16():
    """Triton's interpreter multiplies the bit patterns of bf16 (triton#11584): widen them first."""
    create_dot = InterpreterBuilder.create_dot

    def widen(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_widened_dot(self, a, b, *args):
        return create_dot(self, widen(a), widen(b), *args)

    InterpreterBuilder.create_dot = create_widened_dot
    yield
    InterpreterBuilder.create_dot = create_dot
