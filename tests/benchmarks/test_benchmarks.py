"""The benchmarks' code paths without a GPU: the miniature, the timer, the collector, the report.

No number here comes from a GPU, and none is kept.
"""

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vlcache_triton.kernels import operators

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
ENTRY = {
    "num_seqs": 1,
    "length": 8192,
    "copy_rate": 3000.0,
    "gpu": "made up",
    "torch": "0",
    "triton": "0",
    "commit": "none",
    "date": "never",
}
DECODE = dict(ENTRY, layout="packed", num_kv_heads=8, gigabytes_per_second=1.0)
END_TO_END = dict(
    ENTRY,
    budget=0.1,
    prefill_ms=300.0,
    overhead_percent=0.5,
    roofline_ms=5.0,
    times_roofline=1.2,
    resident_mib=100.0,
    peak_mib=200.0,
)


def run(*command: str | Path, **more) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    # Benchmarks switch themselves off in a worker of xdist, and the child is none.
    env = {k: x for k, x in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, **more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="run_gpu.sh runs the real thing")
def test_the_miniature_passes_and_times_nothing(tmp_path):
    file = tmp_path / "out.json"
    tests = sorted(BENCHMARKS.glob("test_*.py"))
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-json", str(file)]
    done = run(sys.executable, "-m", "pytest", *options, *tests)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "nothing timed" in run(sys.executable, "-m", "pytest", "--co", tests[0]).stdout
    assert not file.exists(), "pytest-benchmark writes a file only where something was timed"


SANITIZE = """
import sanitize
from unittest.mock import Mock
from vlcache_triton.kernels import operators
from vlcache_triton.kernels.append_kernels import _append_kernel
launched, kind = set(), type(_append_kernel)
run = kind.run
def noted(self, *args, **kwargs):
    launched.add(self.fn.__name__)
    return run(self, *args, **kwargs)
kind.run = noted
calls = {name: Mock(wraps=x) for name, x in vars(sanitize).items() if name in operators.__all__}
vars(sanitize).update(calls)
sanitize.main()
print(*sorted(name for name, call in calls.items() if call.called))
print(*sorted(launched))
"""


def test_every_kernel_passes_the_sanitizer_s_script():
    """Every public function, and whatever they can launch."""
    done = run(sys.executable, "-c", SANITIZE)
    assert "one pass of each kernel: done" in done.stdout, done.stderr[-4000:]
    _, called, launched = done.stdout.splitlines()
    assert called.split() == sorted(name for name in operators.__all__ if name.islower())
    sources = [file.read_text() for file in (ROOT / "kernels").glob("*_kernels.py")]
    kernels = {name for text in sources for name in re.findall(r"^def (_\w+_kernel)\(", text, re.M)}
    assert set(launched.split()) == kernels


def test_the_collector_keeps_device_times(tmp_path):
    (tmp_path / "test_device_times.py").write_text(
        "import pytest\n"
        "from measure import CLOCK, record\n"
        "@pytest.mark.benchmark(timer=CLOCK)\n"
        "def test_it(request):\n"
        "    record(request, [0.25, 0.5, 4.0], peer='made up')\n"
    )
    file = tmp_path / "out.json"
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    done = run(sys.executable, "-m", "pytest", *options, "--benchmark-json", file, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    (entry,) = json.loads(file.read_text())["benchmarks"]
    stats, facts = entry["stats"], entry["extra_info"]
    assert (stats["min"], stats["median"], stats["max"]) == (0.25, 0.5, 4.0)
    assert facts["peer"] == "made up"
    assert {"gpu", "torch", "triton", "commit", "date"} <= facts.keys()


class HostEvent:
    """Stands for torch.cuda.Event."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "HostEvent") -> float:
        return 1e3 * (end.at - self.at)


class HostGraph:
    """Stands for torch.cuda.CUDAGraph; replays five milliseconds."""

    def replay(self) -> None:
        time.sleep(0.005)


@pytest.mark.parametrize("graph", [False, True])
def test_a_window_s_time_is_shared_out_among_its_launches(monkeypatch, graph):
    monkeypatch.syspath_prepend(BENCHMARKS)
    measure = importlib.import_module("measure")
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", HostGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda captured: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    launched = []

    def launch(i: int) -> None:
        launched.append(i)
        time.sleep(0.001)

    times = measure.device_times([lambda i=i: launch(i) for i in range(5)], graph=graph)
    assert len(times) == measure.REPEATS
    assert 0.0009 < min(times) < 0.01
    assert launched[2:7] == [0, 1, 2, 3, 4], "after the two that warm up, all in turn"
    assert len(launched) == 7 if graph else len(launched) >= 5 * measure.REPEATS


def test_wrong_results_are_refused(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    check = importlib.import_module("measure").check
    right = torch.arange(1.0, 9.0)
    check(right * 1.005, right)
    for wrong in (right * 1.02, right.flip(0), right * torch.nan):
        with pytest.raises(AssertionError, match="RMS error"):
            check(wrong, right)


def test_ragged_lengths_vary_twentyfold_and_add_up():
    done = run(
        sys.executable,
        "-c",
        "from test_decode import ragged_lengths as r; print([r(n, t) for n, t in"
        " ((8, 8192), (512, 131072), (1, 40))])",
    )
    few, many, one = json.loads(done.stdout)
    assert (sum(few), sum(many), one) == (8192, 131072, [40])
    for lengths in (few, many):
        assert 18 < max(lengths) / min(lengths) < 22


def test_the_report_compares_what_was_measured(tmp_path):
    decode = [
        dict(DECODE, peer=peer, nbytes=33e6, microseconds=us, percent_of_copy_rate=1100 / us)
        for peer, us in (("ours", 12.5), ("sdpa-fa2", 50.0), ("flashinfer", 25.0))
    ]
    kernel = dict(ENTRY, peer="ours", nbytes=30e6, microseconds=20.0)
    loops = [
        dict(END_TO_END, peer=peer, token_ms=ms, total_s=ms / 10)
        for peer, ms in (("lean-0.1", 6.0), ("default", 60.0))
    ]
    crowd = dict(
        ENTRY, budget=0.1, num_prompts=170, memory_gib=40, peak_gib=39, step_ms=9, equal_tokens=1
    )
    entries = [("decode", x) for x in decode] + [("score", kernel), ("concurrency", crowd)]
    entries += [("end_to_end", x) for x in loops]
    made_up = [{"name": f"test_{name}[x]", "extra_info": facts} for name, facts in entries]
    (tmp_path / "gpu_made_up.json").write_text(json.dumps({"benchmarks": made_up}))
    done = run(sys.executable, BENCHMARKS / "report.py", tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "gpu_report.md").read_text()
    assert "| ours | 12.5 | 1 | 88 | 2.00x |" in text
    assert "| 1 x 8192 | ours | 20.0 | 10.0 |" in text
    (lean,) = [line for line in text.splitlines() if "lean-0.1" in line]
    assert lean.endswith("| 10.00x | 10.00x |")
    assert "| 170 x 8192 |" in text
    assert all((tmp_path / f"gpu_{x}.png").stat().st_size > 1000 for x in ("decode", "tokens"))


def test_a_report_of_nothing_is_refused(tmp_path):
    done = run(sys.executable, BENCHMARKS / "report.py", tmp_path)
    assert done.returncode != 0
    assert "no gpu_*.json" in done.stderr


def test_the_scripts_refuse_a_machine_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for script in ("run_gpu.sh", "run_gpu_end_to_end.sh"):
        done = subprocess.run(
            ["bash", BENCHMARKS / script],
            env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "no CUDA device" in done.stderr


def test_a_part_that_runs_too_long_is_stopped_and_the_next_still_runs(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 0\n")  # finds a GPU and every module
    (tmp_path / "python").chmod(0o755)
    script = ". benchmarks/gpu_parts.sh; part 1 long sleep 30; part 5 short echo ran; exit $failed"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1, done.stderr
    assert "long: exit status 124" in done.stdout
    assert (tmp_path / "gpu_short.log").read_text() == "ran\n"


LOOPS = """
import host_loop, json, llava
from vlcache_triton.integrations.transformers import vl_cache
model, passes, counts = llava.build(None), [], {}
model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
def count(name, generate):
    passes.clear()
    generate(**llava.prompt(model, 2, 64), max_new_tokens=20, do_sample=False, eos_token_id=None)
    counts[name] = len(passes)
with host_loop.nothing_computed(model):
    count("transformers", model.generate)
for name in ("stock", "lean"):
    with host_loop.nothing_launched(), vl_cache(model, budget=0.1, cuda_graph=True) as session:
        count(name, session.generate if name == "lean" else model.generate)
print(json.dumps([counts, host_loop.measure(8, (2,))]))
"""


def test_the_host_s_part_of_a_token():
    """The model is taken out: its prefill, and one step of a captured loop, are all that runs."""
    done = run(sys.executable, "-c", LOOPS, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    passes, rows = json.loads(done.stdout)
    assert passes == {"transformers": 1, "stock": 2, "lean": 2}
    assert [x["processors"] for x in rows] == ["greedy", "sampled"]
    assert all(isinstance(x[name], float) for x in rows for name in passes)


HOST_TIME = """
import host_time, json
host_time.CALLS, host_time.REPEATS = 3, 3
print(json.dumps(host_time.measure()))
"""


def test_the_host_s_part_of_a_call(monkeypatch):
    """Compiled functions, as on a GPU, up to the driver; no kernel is compiled or run."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = run(sys.executable, "-c", HOST_TIME)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    launches = {name: x["launches"] for name, x in found.items()}
    assert launches == {
        "pack": 2,
        "varlen_decode": 1,
        "append_kv": 1,
        "decode_schedule": 1,
        "post_vision_stats": 3,
        "key_value_stats": 3,
        "select_tokens": 1,
        "compact_kv": 1,
        "compact_kv_": 1,
        "sum_evicted": 1,
        "store_means": 1,
    }
    assert all(x["call_us"] > 0 < x["bare_us"] for x in found.values())


def test_a_commit_that_cannot_be_measured_is_said_in_one_line():
    done = run(sys.executable, BENCHMARKS / "host_time.py", "--against", "no-commit")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("--against no-commit: fatal: ")


def test_recorded_lengths_are_of_a_compression_to_a_tenth():
    """And are stretched to longer prompts as they are."""
    facts = json.loads((BENCHMARKS / "results" / "kept_lengths.json").read_text())
    code = "import json, test_caches as t; print(json.dumps(t.recorded(32768)))"
    kept = json.loads(run(sys.executable, "-c", code).stdout)
    longest = max(facts["lengths"])
    for row, stretched in zip(facts["kept"], kept, strict=True):
        for n, total, m in zip(row, facts["lengths"], stretched, strict=True):
            assert 0 < n < total
            assert abs(m - n * 32768 / longest) <= 0.5
    for i, total in enumerate(facts["lengths"]):  # rows of a layer's head, on average
        mean = sum(row[i] for row in facts["kept"]) / len(facts["kept"])
        assert abs(mean - facts["budget"] * total) <= 1
