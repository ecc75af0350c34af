"""What a call of each kernel costs the host, beside the bare launch of what it launches.

    python benchmarks/host_time.py [benchmarks/results]             # writes host_time.json there
    python benchmarks/host_time.py --against COMMIT [FOLDER]        # that commit too, in turn

What a commit has not, or has by another name, is left out for it; one from before e3697b0, which
has its kernels elsewhere, is refused.

`pack` is what follows the last layer of a prompt: budgets, selection, and the compaction of 32
layers into a cache; beside launches and checks it has small operations of torch.

No GPU is used: Triton's launcher runs as far as the driver, with a stub for what it would launch.
The bare launch is that alone, with the arguments of the call; the rest are checks, the choice of a
launch, and memory. Tensors lie in the CPU's memory, so allocations cost what they cost there. The
clock is the process's own, which stands still while others have the core.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parent.parent
NUM_SEQS, HEADS, GROUP, D, LENGTH = 1, 8, 4, 128, 1024  # a layer's step, one request of a 7B model
CALLS, REPEATS = 300, 9


class Stub:
    """A compiled kernel that does not launch."""

    function, packed_metadata = None, ()

    def launch_metadata(self, *args: Any) -> None:
        """Nothing for a profiler."""

    def run(self, *args: Any) -> None:
        """Where the driver would be called."""


class Driver:
    """A GPU that is not there, as far as Triton's launcher asks."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def nothing_compiled(self: JITFunction, key: Any, *args: Any) -> Stub:
    """In place of a compilation."""
    kernel = self.device_caches[0][0][key] = Stub()
    return kernel


def ints(*values: int) -> Tensor:
    """An int32 vector."""
    return torch.tensor(values, dtype=torch.int32)


def floats(*shape: int) -> Tensor:
    """Normal, in the dtype of models."""
    return torch.randn(*shape).to(torch.bfloat16)


def make_pack() -> Callable[[], object]:
    """The compression of 32 layers whose statistics are there."""
    from vlcache_triton import VLCacheConfig, ops
    from vlcache_triton.kernels import operators
    from vlcache_triton.kernels.types import PostVisionStats
    from vlcache_triton.pool.compress import PromptCompressor
    from vlcache_triton.recipe.prompt import Prompt

    try:
        from vlcache_triton.recipe.statistics import LayerStats as noted
    except ImportError:  # before 058b8c3 nothing was noted but these

        def noted(stats: PostVisionStats) -> PostVisionStats:
            return stats

    k, v = (floats(NUM_SEQS * LENGTH, HEADS, D) for _ in range(2))
    counts = [torch.full((1, n), LENGTH) for n in (HEADS * GROUP, 1)]
    scores = torch.rand(32, HEADS, LENGTH)
    stats = [noted(PostVisionStats(x, counts[0], 9 * counts[1][0])) for x in scores]
    prompt, config = Prompt(LENGTH, (0,), (50,)), VLCacheConfig(budget=0.1)
    backend = ops._backend("triton", operators)

    def pack() -> object:
        compressor = PromptCompressor(prompt, len(scores), config, backend)
        compressor._stats, compressor._rows = list(stats), [(k, v)] * len(scores)
        return compressor.pack(64)

    return pack


def make_calls() -> dict[str, tuple[str, tuple, dict[str, Any]]]:
    """One call of each kernel: its file and its arguments. Lengths lie on the device; memory is
    made by the call, as adapters do."""
    segments, kept = NUM_SEQS * HEADS, LENGTH // 10
    pools = [floats(segments * LENGTH, 1, D) for _ in range(2)]
    starts = torch.arange(segments + 1, dtype=torch.int32) * LENGTH
    one_row, used = torch.arange(segments + 1, dtype=torch.int32), ints(*[LENGTH // 2] * segments)
    q, new = floats(segments, GROUP, D), floats(segments, 1, 1, D)
    k, v = (floats(NUM_SEQS * LENGTH, HEADS, D) for _ in range(2))
    rows, starts_q, starts_k = floats(50, HEADS * GROUP, D), ints(0, 50), ints(0, LENGTH)
    scores, keep = torch.rand(32, HEADS, LENGTH), torch.full((32, 1), kept, dtype=torch.int32)
    selection = ints(*range(segments * kept)), torch.arange(segments + 1).int()
    sums, counts = [torch.zeros(segments, 4, D)] * 2, ints(*[LENGTH - kept] * segments)
    layers = [x.expand(32, -1).contiguous() for x in (starts, used)]
    live, most = {"causal": True, "seqused_k": used}, {"max_kept": kept}
    stacked = {"max_seqlen": LENGTH, "total_kept": scores.numel()}
    return {
        "varlen_decode": ("decode", (q, *pools, one_row, starts, 1, LENGTH), live),
        "append_kv": ("append", (new, new, *pools, starts, used), {}),
        "decode_schedule": (
            *("schedule", (q, *pools, layers[0], 1, LENGTH)),
            {"seqused_k": layers[1]},
        ),
        "post_vision_stats": ("score", (rows, k, starts_q, starts_k, 50, LENGTH), {}),
        "key_value_stats": ("key_value_stats", (k, v, starts_k, LENGTH), {}),
        "select_tokens": ("select", (scores, starts_k, keep, keep), stacked),
        "compact_kv": ("compact", (k, v, starts_k, *selection, *pools, starts), most),
        "compact_kv_": ("compact", (k, v, starts_k, *selection), most),
        "sum_evicted": ("remainder", (k, v, starts_k, *selection, LENGTH), {}),
        "store_means": ("remainder", (*sums, counts, *pools, starts), {}),
    }


def make_call(name: str) -> Callable[[], object]:
    """That of a kernel, or `pack`."""
    if name == "pack":
        return make_pack()
    file, args, options = make_calls()[name]
    module = importlib.import_module(f"vlcache_triton.kernels.{file}")
    return functools.partial(getattr(module, name), *args, **options)


def microseconds(call: Callable[[], object]) -> float:
    """The median of some repeats, each the mean of many calls."""
    times = []
    calls = 10  # and then as many as take some milliseconds
    for _ in range(REPEATS + 1):
        start = time.process_time()
        for _ in range(calls):
            call()
        times.append((time.process_time() - start) / calls * 1e6)
        calls = max(min(CALLS, int(20e3 / times[-1])), 10)
    return statistics.median(times[1:])


def recorded(call: Callable[[], object]) -> list[tuple[JITFunction, tuple, dict]]:
    """What a call launches."""
    launches: list[tuple[JITFunction, tuple, dict]] = []
    run = JITFunction.run

    def noted(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        launches.append((self, args, kwargs))
        return run(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", noted):
        call()
    return launches


def measure(older: bool = False) -> dict[str, dict[str, float]]:
    """Microseconds of every call, and of its launches alone; of an older tree, of what it has."""
    from vlcache_triton.kernels import checks

    torch.set_num_threads(1)
    driver.set_active(Driver())
    found = {}
    with (
        mock.patch.object(JITFunction, "_do_compile", nothing_compiled),
        mock.patch.object(checks, "interpreted", lambda: True),  # lets tensors off the GPU pass
    ):
        for name in ("pack", *make_calls()):
            try:
                call = make_call(name)
                launches = recorded(call)
            except (ImportError, AttributeError, TypeError):
                if older:
                    continue
                raise

            def bare(launches: list = launches) -> None:
                for kernel, args, kwargs in launches:
                    kernel.run(*args, **kwargs)

            whole, alone = microseconds(call), microseconds(bare)
            found[name] = {"launches": len(launches), "call_us": whole, "bare_us": alone}
    return found


def measured_in(tree: Path, name: str) -> dict[str, dict[str, float]]:
    """The same in a process of its own, of the kernels of that tree."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(tree)
    command = [sys.executable, __file__, "--child", "this" if tree == ROOT else "older"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"--against {name}: cannot be measured: {done.stderr.splitlines()[-1]}")
    return json.loads(done.stdout)


def in_turn(trees: dict[str, Path], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Each tree in every round, so that what else the machine does hits all alike; the medians."""
    runs = [{name: measured_in(tree, name) for name, tree in trees.items()} for _ in range(rounds)]
    return {
        name: {
            call: {fact: statistics.median(run[name][call][fact] for run in runs) for fact in facts}
            for call, facts in runs[0][name].items()
        }
        for name in trees
    }


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown."""
    lines = ["| call | of | launches | bare, µs | call, µs | over it, µs | ratio |"]
    lines.append("|---|---|---|---|---|---|---|")
    for call in results["this"]:
        for name, x in ((name, calls[call]) for name, calls in results.items() if call in calls):
            over, ratio = x["call_us"] - x["bare_us"], x["call_us"] / x["bare_us"]
            numbers = f"{x['bare_us']:.1f} | {x['call_us']:.1f} | {over:.1f} | {ratio:.2f}"
            lines.append(f"| {call} | {name} | {x['launches']:.0f} | {numbers} |")
    return "\n".join(lines)


def unpacked(commit: str, folder: Path) -> Path:
    """The tree of a commit, in a folder of its own."""
    tree = folder / commit
    archive = ["git", "archive", "--format=tar", commit]
    packed = subprocess.run(archive, cwd=ROOT, capture_output=True, check=False)
    if packed.returncode:
        sys.exit(f"--against {commit}: {packed.stderr.decode().strip()}")
    tree.mkdir(parents=True)
    subprocess.run(["tar", "-x", "-C", tree], input=packed.stdout, check=True)
    return tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="where host_time.json goes")
    more = {"metavar": "COMMIT", "action": "append", "default": []}
    parser.add_argument("--against", help="measure this commit's kernels too", **more)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=["this", "older"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child == "older")))
        return
    with tempfile.TemporaryDirectory() as folder:
        trees = {commit: unpacked(commit, Path(folder)) for commit in options.against}
        results = in_turn({**trees, "this": ROOT}, options.rounds)
    print(table(results))
    if options.folder:
        from measure import environment

        facts = {**environment(), "rounds": options.rounds, "microseconds": results}
        (options.folder / "host_time.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
