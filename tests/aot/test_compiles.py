"""Every kernel compiles for Ampere, Hopper and Blackwell within their limits, without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Bytes a block may have; 163 KiB on sm_80, but 99 on sm_86 and sm_89, which are compiled for alike.
SHARED_LIMIT = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The assemblers that come with Triton 3.6 to 3.9 keep one pair of registers in memory in a variant
# or two, where that lets a second program run.
STACK_LIMIT = 8
KERNELS = {
    file.stem.removesuffix("_kernels") + kernel
    for file in (ROOT / "kernels").glob("*.py")
    for kernel in re.findall(r"def (_\w+_kernel)\(", file.read_text())
}
# Loops that stream rows: tiles of a block, which are on their way while those before are used. The
# first to go, unseen, wherever an address comes to wait for a load of the same block.
STREAMS = {"decode_split_kernel": 2, "schedule_scheduled_kernel": 2, "score_row_kernel": 1}
MOVES = {"compact_compact_kernel", "compact_compact_in_place_kernel"}
PRODUCTS = {
    "decode_split_kernel",
    "schedule_scheduled_kernel",
    "score_row_kernel",
    "score_column_kernel",
}


def compiled(folder: Path, *options: str) -> list[dict]:
    """The rows of compile_kernels.py, run where @triton.jit makes no interpreted functions."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, HERE / "compile_kernels.py", folder, *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "aot_resources.json").read_text())


def check(rows: list[dict]) -> None:
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["target"] for row in rows} == set(SHARED_LIMIT)
    for row in rows:
        assert row["stack"] + row["local"] <= STACK_LIMIT, f"spills: {row}"
        assert row["shared"] <= SHARED_LIMIT[row["target"]], row
        assert row["registers"] <= 255, row
        whole = "d=100" not in row["case"]  # in pieces of 16 bytes, see addressing.load_rows
        if row["kernel"] in MOVES | PRODUCTS and whole:
            assert row["wide_loads"] > 0, f"K and V do not come 16 bytes at a time: {row}"
        if row["kernel"] in PRODUCTS and row["case"].startswith("bfloat16"):
            assert row["matrix"], f"no matrix instructions: {row}"
        if row["kernel"] in STREAMS and row["case"].startswith("bfloat16") and whole:
            assert row["buffers"] >= 2, f"no block is read ahead: {row}"
            ahead = int(re.search(r"num_stages=(\d)", row["configuration"])[1]) - 2
            assert row["on_their_way"] >= STREAMS[row["kernel"]] * ahead, f"waits for loads: {row}"
            copies = set(row["copies"])
            if "fp8" in row["case"]:  # V, which Triton reads across, comes 8 bytes at a time
                copies -= {"LDGSTS.E.64"}
            assert copies and all(x.endswith(".128") for x in copies), f"narrow copies: {row}"


def test_every_kernel_compiles_without_spills_and_within_shared_memory(tmp_path):
    rows = compiled(tmp_path, "--quick")
    check(rows)
    for target in SHARED_LIMIT:
        parts = {part for row in rows if row["target"] == target for part in row["case"].split()}
        usual = {"bfloat16", "float32", "d=64", "d=128", "paged"}
        fp8 = {89: {"bfloat16", "d=64", "paged", "fp8"}, 90: usual | {"fp8"}}
        assert parts == fp8.get(target, usual)


@pytest.mark.slow
def test_the_full_matrix_compiles(tmp_path):
    check(compiled(tmp_path))
