"""The kernels as a Hub kernel: loaded from a folder, as from the Hub, and run."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vlcache_triton.integrations.hub import write_repository
from vlcache_triton.integrations.hub.repository import KERNELS
from vlcache_triton.kernels import operators

SPEC = importlib.util.find_spec("kernels")  # a checkout's folder of that name has no origin
HUGGING_FACE = SPEC is not None and SPEC.origin is not None
needs_kernels = pytest.mark.skipif(
    not HUGGING_FACE, reason="needs Hugging Face's kernels: pip install --no-deps kernels==0.17.2"
)
BACKEND = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "vlcache-triton"
    write_repository(out)
    return out


def load_as_kernels_does(repository: Path) -> ModuleType:
    """By path, under the name that the metadata give it."""
    variant = repository / "build" / f"torch-{BACKEND}"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def load_with_kernels(repository: Path) -> ModuleType:
    from kernels import get_local_kernel

    return get_local_kernel(repository)


@pytest.fixture(
    params=[
        pytest.param(load_with_kernels, marks=needs_kernels),
        load_as_kernels_does,
    ]
)
def kernel(request, repository) -> ModuleType:
    return request.param(repository)


class Benchmark:
    """Stands for `kernels.benchmark.Benchmark`: a runner gives it a kernel and a device."""


def miniature(repository: Path, kernel: ModuleType, monkeypatch):
    """The repository's benchmark with few keys, one layer of a small model."""
    if not HUGGING_FACE:
        stub = ModuleType("kernels.benchmark")
        stub.Benchmark = Benchmark
        monkeypatch.setitem(sys.modules, "kernels.benchmark", stub)
    path = str(repository / "benchmarks" / "benchmark.py")
    loader = SourceFileLoader("hub_benchmark", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    benchmark = module.VlcacheTritonBenchmark()
    benchmark.kernel, benchmark.device = kernel, BACKEND
    benchmark.num_heads, benchmark.num_kv_heads, benchmark.head_size = 4, 2, 16
    benchmark.num_keys, benchmark.num_rows, benchmark.num_kept = 111, 3, 20
    torch.manual_seed(benchmark.seed)
    benchmark.setup()
    return benchmark


@pytest.mark.parametrize(
    "workload", ["post_vision_stats", "select_tokens", "compact_kv", "varlen_decode"]
)
def test_the_four_kernels_run_from_it_and_its_benchmark_verifies_them(
    repository, kernel, monkeypatch, workload
):
    benchmark = miniature(repository, kernel, monkeypatch)
    getattr(benchmark, f"benchmark_{workload}")()
    expected = getattr(benchmark, f"verify_{workload}")()
    assert benchmark.out.shape == expected.shape
    assert torch.allclose(benchmark.out, expected, atol=1e-2)  # as the runner compares
    if expected.dtype != torch.int32:
        assert not torch.allclose(benchmark.out + 0.1, expected, atol=1e-2)


def test_it_offers_all_operations_and_nothing_else(kernel):
    assert kernel.__all__ == operators.__all__
    assert {"key_value_stats", "compact_layers", "decode_schedule"} < set(kernel.__all__)
    assert all(hasattr(kernel, name) for name in kernel.__all__)


def test_the_card_says_what_each_is_for(repository):
    functions = {name for name in operators.__all__ if name.islower()}
    assert functions == set(re.findall(r"`(\w+)`", card_list(repository)))


def card_list(repository: Path) -> str:
    """The items of the card's list, up to their colons."""
    lines = (repository / "CARD.md").read_text().splitlines()
    return "\n".join(line.partition(":")[0] for line in lines if line.startswith("- `"))


def test_operators_are_in_the_kernel_s_own_namespace(repository, kernel):
    """So that two versions can be loaded side by side."""
    variant = repository / "build" / f"torch-{BACKEND}"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    assert hasattr(getattr(torch.ops, name), "varlen_decode")
    assert kernel.varlen_decode.__module__ == f"{name}.decode"


def test_every_file_of_the_kernels_is_in_it_and_imports_relatively(repository):
    names = {x.name for x in KERNELS.glob("*.py")}
    assert {"score.py", "select.py", "compact.py", "decode.py", "reference.py"} <= names
    source = repository / "torch-ext" / "vlcache_triton"
    assert {x.name for x in source.iterdir()} == {*names, "__init__.py"}
    for variant in ("torch-cuda", "torch-cpu"):
        built = repository / "build" / variant
        assert {x.name for x in built.iterdir()} == {*names, "__init__.py", "metadata.json"}
        assert all((built / n).read_text() == (KERNELS / n).read_text() for n in names)


def test_a_folder_that_exists_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^out: got .*, which exists; expected a new folder"):
        write_repository(tmp_path)


def test_the_command_writes_it(tmp_path):
    command = [sys.executable, "-m", "vlcache_triton.integrations.hub"]
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([*command, tmp_path / "new"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "build.toml").exists()
    usage = subprocess.run(command, env=env, capture_output=True, text=True)
    assert usage.returncode != 0 and "writes the repository to OUT" in usage.stderr


def test_the_build_file_says_what_the_metadata_say(repository):
    build = (repository / "build.toml").read_text()
    for backend in ("cuda", "cpu"):
        file = repository / "build" / f"torch-{backend}" / "metadata.json"
        metadata = json.loads(file.read_text())
        for name in ("name", "version", "license"):
            assert f"{name} = {json.dumps(metadata[name])}\n" in build
        assert metadata["backend"] == {"type": backend}
        assert f'  "{backend}",\n' in build


@needs_kernels
def test_kernels_accepts_the_build_file_and_the_metadata(repository):
    from kernels import Metadata
    from kernels._rust import Build, Digest, DigestAlgorithm

    assert [str(x).lower() for x in Build.open(repository).general.backends] == ["cuda", "cpu"]
    for variant in ("torch-cuda", "torch-cpu"):
        built = repository / "build" / variant
        metadata = Metadata.read_from_file(built / "metadata.json")
        assert str(metadata.name) == "vlcache-triton"
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, built))


@needs_kernels
def test_kernels_benchmarks_it(repository):
    """Its own runner finds the benchmark; what a CPU would time is left out."""
    pytest.importorskip("cryptography")  # which its commands import, and its loader does not
    from kernels.cli.benchmark import discover_benchmark_classes

    script = repository / "benchmarks" / "benchmark.py"
    assert [x.__name__ for x in discover_benchmark_classes(script, repository)] == [
        "VlcacheTritonBenchmark"
    ]
