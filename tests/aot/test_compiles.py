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
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
KERNELS = {
    file.stem.removesuffix("_kernels") + kernel
    for file in (ROOT / "kernels").glob("*.py")
    for kernel in re.findall(r"def (_\w+_kernel)\(", file.read_text())
}
PRODUCTS = {"decode_split_kernel", "score_row_kernel", "score_column_kernel"}


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
        assert row["stack"] == row["local"] == 0, f"spills: {row}"
        assert row["shared"] <= SHARED_LIMIT[row["target"]], row
        assert row["registers"] <= 255, row
        if row["kernel"] in PRODUCTS and row["case"].startswith("bfloat16"):
            assert row["wide_loads"] > 0, f"K and V do not come 16 bytes at a time: {row}"
            assert row["matrix"], f"no matrix instructions: {row}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    return compiled(tmp_path_factory.mktemp("aot"), "--quick")


def test_every_kernel_compiles_without_spills_and_within_shared_memory(rows):
    check(rows)


def test_the_cases_cover_dtypes_head_sizes_and_pages(rows):
    hopper = {row["case"] for row in rows if row["target"] == 90}
    parts = {part for case in hopper for part in case.split()}
    assert parts == {"bfloat16", "float32", "d=64", "d=128", "paged"}


@pytest.mark.slow
def test_the_full_matrix_compiles(tmp_path):
    check(compiled(tmp_path))
