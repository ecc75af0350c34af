"""`vlcache env` tells what a bug report needs."""

import json
import platform
from types import SimpleNamespace

import pytest
import torch
import transformers
import triton

import vlcache_triton
from vlcache_triton.apps.cli import env


def test_json_has_versions_machine_and_backend(vlcache):
    outcome = vlcache("env", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    packages = found["packages"]
    assert packages["vlcache-triton"] == vlcache_triton.__version__
    assert packages["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert packages["transformers"] == transformers.__version__
    assert packages["triton"] == triton.__version__
    assert found["python"] == platform.python_version()
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["backend"] == ("triton" if torch.cuda.is_available() else "reference")


def test_the_table_names_what_is_missing(vlcache, monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(env.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    rows = [line.split("│")[1:3] for line in vlcache("env").out.splitlines() if "│" in line]
    table = {name.strip(): value.strip() for name, value in rows}
    assert table["no-such-package"] == "not installed"
    assert table["GPU"] == "none that torch can use"
    assert table["driver"] == "none found"


def test_gpus_and_their_driver(vlcache, monkeypatch, tmp_path):
    """Of a machine that is not at hand: torch's answers, and a stand-in for nvidia-smi."""
    name, num_bytes = "NVIDIA H100 80GB HBM3", 84_930_000_000
    gpu = SimpleNamespace(name=name, major=9, minor=0, total_memory=num_bytes)
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpu)
    found = env.environment()
    described = {"name": name, "compute_capability": "9.0", "memory_bytes": num_bytes}
    assert found["gpus"] == [described] * 2
    assert found["driver"] == "570.86.15"
    assert ("GPU", "NVIDIA H100 80GB HBM3, 84.9 GB, sm 9.0") in env._lines(found)


@pytest.mark.parametrize("script", ["exit 9", "echo; echo", "kill -9 $$"])
def test_a_driver_that_does_not_answer(monkeypatch, tmp_path, script):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert env._driver() is None


def test_a_backend_that_cannot_load_is_told(monkeypatch):
    """That is what the report will be about."""

    def broken(*_):
        raise ImportError("libcuda.so.1: cannot open shared object file\nmore")

    monkeypatch.setattr("vlcache_triton.ops.get_backend", broken)
    assert env.environment()["backend"] == (
        "none: ImportError: libcuda.so.1: cannot open shared object file"
    )
