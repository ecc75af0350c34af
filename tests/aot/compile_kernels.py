"""Compiles every Triton kernel of kernels/ for GPUs that need not be there, and looks inside.

The launches are those of the public host functions: they run on meta tensors with an H100's number
of multiprocessors, and what they would have launched is compiled instead. So nothing here repeats
a signature or a launch heuristic. Run without TRITON_INTERPRET, in a process of its own:

    python tests/aot/compile_kernels.py benchmarks/results          # the table, every target
    python tests/aot/compile_kernels.py FOLDER --quick              # what CI compiles
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vlcache_triton.kernels import (
    append,
    compact,
    decode,
    descales,
    key_value_stats,
    remainder,
    schedule,
    score,
    select,
)

TARGETS = (80, 89, 90, 100)
H100_MULTIPROCESSORS = 132
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
}
NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE = 32, 8, 16
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = {"num_warps", "num_stages", "maxnreg"}


@dataclass(frozen=True)
class Case:
    """One way to call the host functions."""

    dtype: str
    head_size: int
    paged: bool
    fp8: bool = False  # K and V of the pool

    def __str__(self) -> str:
        name = f"{self.dtype} d={self.head_size}" + (" paged" if self.paged else "")
        return name + (" fp8" if self.fp8 else "")


@dataclass
class Launch:
    """A kernel with the arguments that a host function launches it with."""

    case: str
    name: str
    kernel: JITFunction
    arguments: dict[str, Any]


@dataclass
class Compiled:
    """What became of a launch: resources of a thread (registers, bytes of stack and of local
    memory) and of a block (bytes of shared memory), machine instructions of interest, and how far
    loads run ahead of a loop that streams rows."""

    kernel: str
    case: str
    configuration: str
    target: int
    registers: int
    stack: int
    local: int
    shared: int
    wide_loads: int  # of 16 bytes from global memory
    matrix: list[str]
    copies: list[str]  # kinds of background copies into shared memory, by their bytes
    buffers: int  # in shared memory, of a tile that is copied in the background; 0 without such
    on_their_way: int  # copies of tiles that are, where a loop waits for the one that it needs


OTHER_HEAD_SIZES = (80, 96, 100, 192, 256)  # 100: rows in pieces of 8 bytes, see load_rows
CASES = [
    Case(dtype, head_size, paged)
    for dtype in ("bfloat16", "float32")
    for head_size in (128, 64)
    for paged in (False, True)
] + [Case("bfloat16", head_size, False) for head_size in OTHER_HEAD_SIZES]
CASES += [
    Case("bfloat16", 128, False, fp8=True),
    Case("bfloat16", 64, True, fp8=True),
    Case("float32", 128, True, fp8=True),
] + [
    Case("bfloat16", head_size, False, fp8=True)
    for head_size in OTHER_HEAD_SIZES
    if head_size % 16 == 0
]


def is_possible(case: Case, target: int) -> bool:
    """sm_80 has no fp8; sm_89 is compiled for where it differs by that."""
    return target != 80 if case.fp8 else target != 89


def is_quick(case: Case, target: int) -> bool:
    """CI compiles all cases of the usual head sizes for Hopper; for the others half, any two of
    their traits together."""
    if case.head_size in OTHER_HEAD_SIZES:
        return False
    if case.fp8:
        return case.dtype == "bfloat16" and target == (89 if case.paged else 90)
    return target == 90 or (case.dtype == "float32") ^ (case.head_size == 64) == case.paged


@contextmanager
def recorded_launches(case: str, launches: list[Launch]) -> Iterator[None]:
    """Note what host functions launch, on meta tensors taken for an H100's."""

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        assert not args, "launches are by keyword"
        arguments = {k: v for k, v in kwargs.items() if k not in ("grid", "warmup")}
        name = self.fn.__module__.rsplit(".", 1)[-1].removesuffix("_kernels")
        launches.append(Launch(case, name + self.fn.__name__, self, arguments))

    def multiprocessors(device: torch.device) -> int:
        return H100_MULTIPROCESSORS

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(score, "num_multiprocessors", multiprocessors),
        mock.patch.object(decode, "num_multiprocessors", multiprocessors),
        mock.patch.object(schedule, "num_multiprocessors", multiprocessors),
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # lets tensors off the GPU pass
    ):
        yield


def call_host_functions(case: Case) -> None:
    """Each kernel once a compiled variant: 16 sequences of 8K tokens, groups of 4 heads."""
    num_seqs, length, group = 16, 8192, NUM_HEADS // NUM_KV_HEADS
    dtype, d = getattr(torch, case.dtype), case.head_size
    num_segments = num_seqs * NUM_KV_HEADS

    def floats(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def ints(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device="meta")

    def cache_of(
        sequences: int, heads: int, dtype: torch.dtype = dtype
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        shape, pages = (sequences * length, heads, d), {}
        if case.paged:
            shape = (sequences * length // PAGE_SIZE, PAGE_SIZE, heads, d)
            pages = {"block_table": ints(sequences, length // PAGE_SIZE)}
        k, v = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))
        return k, v, pages

    k, v, pages = cache_of(num_seqs, NUM_KV_HEADS)
    starts = ints(num_seqs + 1)
    used = {"seqused_k": ints(num_seqs)} if case.paged else {}
    maxima = dict(row_reduction="max", group_reduction="max")
    sinks = dict(sinks=floats(NUM_HEADS))
    for rows, options in ((50, {}), (1, sinks), (1, maxima)):  # blocks of 128 and of 64 query rows
        q = floats(num_seqs * rows, NUM_HEADS, d)
        if options is maxima:
            options = options | dict(row_weights=torch.empty(len(q), device="meta"))
        score.post_vision_stats(q, k, starts, starts, rows, length, **used, **pages, **options)

    key_value_stats.key_value_stats(k, v, starts, length, **used, **pages)

    kept = (ints(num_segments * 800), ints(num_segments + 1))
    pool_dtype, scales, layer_scales = dtype, {}, {}
    if case.fp8:
        pool_dtype = torch.float8_e4m3fn
        names = ("k_descale", "v_descale")
        layer_scales = {x: torch.empty(2, num_segments, 1, device="meta") for x in names}
        scales = {name: x[0] for name, x in layer_scales.items()}
    pool_k, pool_v, pool_pages = cache_of(num_segments, 1, pool_dtype)
    out_pages = {"out_block_table": pool_pages["block_table"]} if case.paged else {}
    compact.compact_kv(
        k,
        v,
        starts,
        *kept,
        pool_k,
        pool_v,
        ints(num_segments + 1),
        max_kept=800,
        **pages,
        **out_pages,
        **scales,
    )
    descales.kept_descales([k], [v], starts, *kept, max_kept=800, **pages)
    compact.compact_kv_(k, v, starts, *kept, max_kept=800, **pages)
    if not case.paged:
        layers = ([k, k], [v, v], starts, kept[0], ints(2 * num_segments + 1))
        places = ints(2, num_segments + 1)
        compact.compact_layers(*layers, pool_k, pool_v, places, max_kept=800, **layer_scales)
        descales.kept_descales(*layers, max_kept=800)

    sums = remainder.sum_evicted(k, v, starts, *kept, length, **used, **pages)
    segment_starts = ints(num_segments + 1)
    means = (*sums, ints(num_segments), pool_k, pool_v, segment_starts)
    remainder.store_means(*means, **out_pages, **scales)

    starts, used = ints(num_segments + 1), ints(num_segments)
    for num_rows in (1, 32):
        row = floats(num_segments, num_rows, 1, d)
        append.append_kv(row, row, pool_k, pool_v, starts, used, **pool_pages, **scales)
    bias = torch.empty(num_segments, device="meta")
    both = dict(first_key_bias=bias, sinks=floats(NUM_KV_HEADS, group))
    # Split and direct, both with and without a bias and sinks; and the largest blocks of rows, with
    # the left bound of a window.
    for longest, rows, window, options in (
        (length, 1, -1, {}),
        (length, 1, -1, both),
        (1, 1, -1, {}),
        (1, 1, -1, both),
        (length, 16, 1024, {}),
    ):
        q = floats(num_segments * rows, group, d)
        decode.varlen_decode(
            *(q, pool_k, pool_v, starts, starts, rows, longest),
            causal=True,
            window_size=(window, -1),
            seqused_k=used,
            **options,
            **pool_pages,
            **scales,
        )
    if schedule.IS_SUPPORTED:
        q = floats(num_segments, group, d)
        facts = (q, pool_k, pool_v, starts[None], 1, length)
        table = schedule.decode_schedule(*facts, seqused_k=used[None], num_new=1, **pool_pages)
        step = (q, pool_k, pool_v, starts, starts, 1, length)
        where = dict(seqused_k=used, schedule=table[0], **both, **pool_pages, **scales)
        decode.varlen_decode(*step, causal=True, **where)
    if not case.paged:  # neither knows of dtypes or pages
        scores = torch.empty(32, NUM_KV_HEADS, num_seqs * length, device="meta")
        keep = ints(32, num_seqs)
        for longest in (length, 1024):
            select.select_tokens(scores, ints(num_seqs + 1), keep, keep, max_seqlen=longest)


def specialise(launch: Launch) -> tuple[ASTSource, dict[str, int]]:
    """The source and options that Triton's own just-in-time compiler would come to."""
    signature, constants, attributes = {}, {}, {}
    for parameter in launch.kernel.params:
        place, value = (parameter.num,), launch.arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[place] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[place] = [["tt.divisibility", 16]]  # as torch allocates
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[place] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    return source, {k: v for k, v in launch.arguments.items() if k in OPTIONS}


@cache
def all_launches() -> list[Launch]:
    """Every launch of every case, each compiled variant once."""
    launches: list[Launch] = []
    for case in CASES:
        with recorded_launches(str(case), launches):
            call_host_functions(case)
    variants: dict[str, Launch] = {}
    for launch in launches:
        source, options = specialise(launch)
        variants.setdefault(f"{source.hash()} {sorted(options.items())}", launch)
    return list(variants.values())


def compile_launch(index: int, target: int) -> Compiled:
    """Compile one launch of all_launches() for compute capability `target`."""
    launch = all_launches()[index]
    source, options = specialise(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    usage, sass = inspect_cubin(compiled.asm["cubin"])
    ttgir = compiled.asm["ttgir"]
    buffers = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", ttgir)
    waits = re.findall(r"ttg\.async_wait .*\{num = (\d+)", ttgir)
    blocks = {
        k: v
        for k, v in launch.arguments.items()
        if k in OPTIONS or k.startswith("BLOCK") or k in ("SMALL_M", "ROWS", "DIRECT", "BOUND_LEFT")
    }
    if launch.arguments.get("first_key_bias_ptr") is not None:
        blocks["bias"] = True
    if launch.arguments.get("sinks_ptr") is not None:
        blocks["sinks"] = True
    if launch.arguments.get("layers_ptr") is not None:
        blocks["layers"] = True
    if launch.arguments.get("ROW_MAX"):
        blocks["maxima, weights"] = True
    return Compiled(
        kernel=launch.name,
        case=launch.case,
        configuration=" ".join(f"{k}={v}" for k, v in blocks.items()),
        target=target,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
        wide_loads=len(re.findall(r"\b(?:LDG\.E\.128|LDGSTS\.E\.(?:\w+\.)*128)\b", sass)),
        matrix=sorted(set(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", sass))),
        copies=sorted(set(re.findall(r"\bLDGSTS\.[\w.]+", sass))),
        buffers=max(map(int, buffers), default=0),
        on_their_way=max(map(int, waits), default=0),
    )


def inspect_cubin(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage as the loader would see it, and the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            tool, *options = command
            done = subprocess.run(
                [TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True
            )
            return done.stdout

        usage = re.findall(r"(\w+):(\d+)", run("cuobjdump", "--dump-resource-usage"))
        return {name: int(value) for name, value in usage}, run("nvdisasm", "-c")


def compile_all(wanted: Callable[[Case, int], bool], processes: int = 2) -> list[Compiled]:
    """Compile what is wanted, in processes that share Triton's cache on the disk."""
    cases = {str(case): case for case in CASES}
    jobs = [
        (index, target)
        for index, launch in enumerate(all_launches())
        for target in TARGETS
        if is_possible(cases[launch.case], target) and wanted(cases[launch.case], target)
    ]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_launch, *zip(*jobs, strict=True)))


def markdown(results: list[Compiled]) -> str:
    """The table, one row a kernel, case and target."""
    lines = [
        f"Compiled ahead of time by Triton {triton.__version__}; nothing here was run.",
        "",
        "| kernel | case | configuration | sm | registers | stack | shared | 16-byte loads"
        " | buffers | on their way | matrix |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for x in results:
        lines.append(
            f"| {x.kernel} | {x.case} | {x.configuration} | {x.target} | {x.registers}"
            f" | {x.stack + x.local} | {x.shared} | {x.wide_loads} | {x.buffers}"
            f" | {x.on_their_way} | {' '.join(x.matrix)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where aot_resources.json and .md go")
    parser.add_argument("--quick", action="store_true", help="only what CI compiles")
    parser.add_argument("--target", type=int, choices=TARGETS, help="only this compute capability")
    options = parser.parse_args()

    def wanted(case: Case, target: int) -> bool:
        return options.target in (None, target) and (is_quick(case, target) or not options.quick)

    results = compile_all(wanted)
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(x) for x in results]
    (options.folder / "aot_resources.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.folder / "aot_resources.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
