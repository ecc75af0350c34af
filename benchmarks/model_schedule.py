"""A MODEL of how long decode takes with and without a schedule. Nothing here is measured.

    python benchmarks/model_schedule.py [benchmarks/results]        # writes schedule_model.md there

Grids, splits, shares and workspaces are those of the host functions, for an H100. Only the time is
a model: programs run in grid order on the slots that are free, each slot loads at its share of the
copy rate whatever the others do, and a program, a piece of a sequence and an idle program cost
fixed times. So it sees what schedules differ in, idle slots and programs, and neither caches nor
clocks. Lengths are those of benchmarks/test_caches.py, recorded ones among them.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vlcache_triton.kernels.decode import (
    PROGRAMS_PER_MULTIPROCESSOR,
    DecodeLaunch,
    ScheduleLaunch,
    decode_launch,
    schedule_launch,
)

MULTIPROCESSORS, GROUP, D, ITEMSIZE = 132, 4, 128, 2
SLOTS = MULTIPROCESSORS * PROGRAMS_PER_MULTIPROCESSOR
# Assumptions, microseconds but for the first.
COPY_RATE = 2.9e6  # bytes a microsecond
PROGRAM, PIECE, IDLE, LAUNCH = 2.0, 1.0, 0.1, 2.0
KEY = 2 * D * ITEMSIZE / (COPY_RATE / SLOTS)  # K and V of one key, by one slot
RECORDED = json.loads((Path(__file__).parent / "results" / "kept_lengths.json").read_text())


class Case(NamedTuple):
    """Live lengths of one layer, the bound that the host knows, KV heads of a sequence."""

    lengths: list[int]
    capacity: int
    num_kv_heads: int = 1


class Modelled(NamedTuple):
    """live, launched: programs. workspace: bytes. time: microseconds."""

    live: int
    launched: int
    workspace: int
    time: float


def cases() -> dict[str, Case]:
    """Those of the issue that asked for schedules, and layers as a real compression left them."""
    found = {
        "one of 128K beside 63 of 256": Case([131072, *[256] * 63], 131072, 8),
        "64 of 820, captured for 128K": Case([820] * 64, 131072, 8),
        "1.3K kept where another layer keeps 52K": Case([1300] * 8, 52000),
        "1x8K, full": Case([8192], 8192, 8),
        "16x8K, full": Case([8192] * 16, 8192, 8),
    }
    factor = 32768 / max(RECORDED["lengths"])
    layers = sorted(([round(n * factor) for n in row] for row in RECORDED["kept"]), key=sum)
    longest = max(map(max, layers)) + 256
    for name, row in (("least", layers[0]), ("most", layers[-1])):
        for batch in (1, 4, 16):
            lengths = [n for n in (row * 4)[:batch] for _ in range(8)]
            found[f"recorded, 10 % of 32K, layer that keeps {name}, batch {batch}"] = Case(
                lengths, longest
            )
    return found


def makespan(times: Iterable[float]) -> float:
    """Until the last of the programs is done, which start in order as slots get free."""
    slots = [0.0] * SLOTS
    for time in times:
        heapq.heapreplace(slots, slots[0] + time)
    return max(slots)


def combination(rows: int, launched: int) -> float:
    """Of so many partial rows: read once, a launch, and its programs."""
    return LAUNCH + rows * (D + 1) * 4 / COPY_RATE + launched * IDLE / SLOTS


def without(case: Case, plan: DecodeLaunch) -> Modelled:
    """By capacities: splits of one size."""
    live = [
        min(plan.split_size, n - split * plan.split_size)
        for split in range(plan.num_splits)
        for n in case.lengths
        for _ in range(case.num_kv_heads)
    ]
    time = makespan(PROGRAM + n * KEY if n > 0 else IDLE for n in live)
    num_live, rows = sum(n > 0 for n in live), len(case.lengths) * case.num_kv_heads * GROUP
    workspace = 0
    if plan.num_splits > 1:
        workspace = plan.num_splits * rows * (D + 1) * 4
        time += combination(num_live * GROUP, rows)
    return Modelled(num_live, len(live), workspace, time)


def with_schedule(case: Case, plan: DecodeLaunch, cut: ScheduleLaunch) -> Modelled:
    """By live lengths: the same share for each program, in pieces of sequences."""
    blocks = [-(-n // plan.BLOCK_N) for n in case.lengths]
    share = max(-(-sum(blocks) // cut.num_programs), cut.min_share)
    pieces, shared, first = [0] * cut.num_programs, 0, 0
    for n in filter(None, blocks):
        own = range(first // share, (first + n - 1) // share + 1)
        for program in own:
            pieces[program] += 1
        shared += len(own) if len(own) > 1 else 0
        first += n
    times, left = [], sum(blocks)
    for n in pieces:
        keys, left = min(share, left) * plan.BLOCK_N, max(left - share, 0)
        times.append(PROGRAM + (n - 1) * PIECE + keys * KEY if n else IDLE)
    rows = len(blocks) * case.num_kv_heads * GROUP
    time = makespan(t for t in times for _ in range(case.num_kv_heads))
    time += combination(shared * case.num_kv_heads * GROUP, rows)
    workspace = (cut.num_programs + len(blocks)) * case.num_kv_heads * GROUP * (D + 1) * 4
    live = sum(n > 0 for n in pieces) * case.num_kv_heads
    return Modelled(live, cut.num_programs * case.num_kv_heads, workspace, time)


def modelled(case: Case) -> tuple[Modelled, Modelled, float]:
    """Both, and the time of the bytes alone."""
    shape = (case.num_kv_heads, len(case.lengths))
    plan = decode_launch(D, ITEMSIZE, GROUP, *shape, 1, case.capacity, MULTIPROCESSORS)
    cut = schedule_launch(plan, GROUP, *shape, case.capacity, MULTIPROCESSORS)
    bytes_alone = sum(case.lengths) * case.num_kv_heads * 2 * D * ITEMSIZE / COPY_RATE
    return without(case, plan), with_schedule(case, plan, cut), bytes_alone


def table() -> str:
    """Markdown."""
    lines = [
        "Times are of a model (benchmarks/model_schedule.py): **nothing here was measured**.",
        "Programs and workspaces are what the host functions launch and allocate for an H100.",
        "The schedule itself, one launch a step for all layers, is not in the times.",
        "",
        "| lengths of a layer | schedule | live / launched programs | workspace, KiB"
        " | modelled, µs | bytes alone, µs |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in cases().items():
        *both, least = modelled(case)
        for schedule, x in zip(("no", "yes"), both, strict=True):
            lines.append(
                f"| {name} | {schedule} | {x.live} / {x.launched} | {x.workspace / 1024:.0f}"
                f" | {x.time:.1f} | {least:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="where schedule_model.md goes")
    folder = parser.parse_args().folder
    print(table())
    if folder:
        (folder / "schedule_model.md").write_text(table())


if __name__ == "__main__":
    main()
