"""pytest-benchmark as the collector of device times; on the CPU, a miniature that times nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from measure import CLOCK, HAS_GPU, copy_rate, device_times, environment, record

Measure = Callable[..., None]


def pytest_report_header() -> str:
    """Say what is being measured, if anything is."""
    return f"benchmarks on: {environment()['gpu']}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the end-to-end benchmark."""
    parser.addoption("--model", help="weights to load; default: random, LLaVA-1.6-Mistral-7B's")
    parser.addoption(
        "--memory-gib", type=float, help="GPU memory of the concurrency run; default: all of it"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have every benchmark timed by the device's clock."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Measure:
    """`measure(launches, nbytes=..., graph=..., **facts)`: call it once the result was checked.

    launches: the same work on inputs that rotate (measure.num_copies).
    nbytes: what one launch must read and write at least.
    graph: see measure.device_times.
    """

    def measured(
        launches: Sequence[Callable[[], object]], *, nbytes: int, graph: bool = True, **facts: Any
    ) -> None:
        if not HAS_GPU:
            for launch in launches:
                launch()
            return
        times = device_times(launches, graph=graph)
        median = sorted(times)[len(times) // 2]
        record(
            request,
            times,
            **facts,
            nbytes=nbytes,
            microseconds=median * 1e6,
            gigabytes_per_second=nbytes / median / 1e9,
            copy_rate=copy_rate() / 1e9,
            percent_of_copy_rate=100 * nbytes / median / copy_rate(),
            method="CUDA graph, cold L2" if graph else "launches included, cold L2",
        )

    return measured
