"""pytest-benchmark as the collector of device times; on the CPU, a miniature that times nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from measure import HAS_GPU, copy_rate, device_times, environment

Measure = Callable[..., None]


class DeviceClock:
    """A timer that advances by device times, so that pytest-benchmark's statistics are of those."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = DeviceClock()


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


def record(request: pytest.FixtureRequest, times: Sequence[float], **facts: Any) -> None:
    """Hand device times (seconds) and facts to pytest-benchmark."""
    benchmark = request.getfixturevalue("benchmark")
    remaining = iter(times)

    def advance() -> None:
        CLOCK.seconds += next(remaining)

    benchmark.pedantic(advance, rounds=len(times), iterations=1)
    benchmark.extra_info.update(facts, **environment())


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
