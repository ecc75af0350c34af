"""Device times with a cold L2 cache, the copy rate beside them, and how good a result must be."""

from __future__ import annotations

import datetime
import functools
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# Triton's interpreter multiplies bf16's bit patterns (triton#11584).
DTYPE = torch.bfloat16 if HAS_GPU else torch.float16
REPEATS = 20
MIN_WINDOW = 2e-3  # seconds a timed window lasts at least: events resolve half a microsecond


def num_copies(nbytes: int, limit: int = 128) -> int:
    """How many sets of inputs to rotate through so that each is out of the L2 cache when its turn
    comes: thrice the cache in all, two sets at least."""
    if not HAS_GPU:
        return 1
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return max(2, min(limit, -(-3 * cache // max(nbytes, 1))))


def device_times(launches: Sequence[Callable[[], object]], *, graph: bool) -> list[float]:
    """Seconds of one launch, once a repeat: the mean over a window that launches all in turn.

    Args:
        launches: the same work on different inputs (see num_copies).
        graph: replay the window as a CUDA graph, which leaves out what launching costs the host.
    """
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()

    def window() -> None:
        for launch in launches:
            launch()

    replay: Callable[[], object] = window
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            window()
        replay = captured.replay
    first = _elapsed(replay, 1)
    count = max(1, int(MIN_WINDOW / max(first, 1e-7)))
    repeats = max(3, min(REPEATS, int(1.0 / (first * count))))
    return [_elapsed(replay, count) / (count * len(launches)) for _ in range(repeats)]


def _elapsed(run: Callable[[], object], count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def copy_rate() -> float:
    """Bytes a second, read and written, of a device-to-device copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    seconds = statistics.median(device_times([lambda: target.copy_(source)] * 2, graph=False))
    return 2 * source.nbytes / seconds


@functools.cache
def environment() -> dict[str, str]:
    """What a number depends on besides the code."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        # A copy of the tree without its history is told its commit.
        "commit": os.environ.get("COMMIT")
        or _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "gpu": "none: CPU, Triton's interpreter, nothing timed",
    }
    if HAS_GPU:
        found["gpu"] = torch.cuda.get_device_name(DEVICE)
        query = "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,driver_version"
        found["clocks.sm,max,mem,driver"] = _output("nvidia-smi", query, "--format=csv,noheader")
    return found


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return f"unknown: no {command[0]}"
    return done.stdout.strip() or f"unknown: {done.stderr.strip()[:80]}"


def check(actual: Tensor, expected: Tensor, rms: float = 0.01) -> None:
    """Refuse to time what is wrong: RMS error at most 1 % of the fp32 reference's RMS."""
    actual, expected = actual.float(), expected.float()
    error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= rms, f"RMS error {error:.2%} of the fp32 reference's RMS"


class DeviceClock:
    """A timer that advances by device times, so that pytest-benchmark's statistics are of those."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = DeviceClock()


def record(request: pytest.FixtureRequest, times: Sequence[float], **facts: Any) -> None:
    """Hand device times (seconds) and facts to pytest-benchmark."""
    benchmark = request.getfixturevalue("benchmark")
    remaining = iter(times)

    def advance() -> None:
        CLOCK.seconds += next(remaining)

    benchmark.pedantic(advance, rounds=len(times), iterations=1)
    benchmark.extra_info.update(facts, **environment())
