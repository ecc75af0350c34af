"""The seam: a caller names its arithmetic, and nothing falls back silently."""

import importlib.util
import inspect

import pytest
import torch
from prompts import CPU

from vlcache_triton import reference
from vlcache_triton.backend import Backend, get_backend

OPERATIONS = Backend._fields[1:]
KERNELS = ("score", "select", "compact", "decode")
needs_kernels = pytest.mark.skipif(
    not all(importlib.util.find_spec(f"vlcache_triton.kernels.{name}") for name in KERNELS),
    reason="some Triton kernels are still to come",
)


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_the_reference_serves_the_cpu(name):
    backend = get_backend(name, CPU)
    assert backend.name == "reference"
    for operation in OPERATIONS:
        assert getattr(backend, operation) is getattr(reference, operation)


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None])
def test_an_unknown_backend_is_named(name):
    with pytest.raises(ValueError, match=f"^backend: got {name!r}, expected one of"):
        get_backend(name, CPU)


@pytest.mark.parametrize("setting", [None, "0"])
def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch, setting):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if setting is not None:
        monkeypatch.setenv("TRITON_INTERPRET", setting)
    with pytest.raises(ValueError, match=r"^backend: got 'triton' for a model on cpu"):
        get_backend("triton", CPU)


@needs_kernels
@pytest.mark.parametrize(("name", "device"), [("triton", "cuda"), ("auto", "cuda")])
def test_triton_serves_cuda(name, device):
    backend = get_backend(name, torch.device(device))
    assert backend.name == "triton"
    for operation in OPERATIONS:
        assert getattr(backend, operation).__module__.startswith("vlcache_triton.kernels.")


@needs_kernels
@pytest.mark.parametrize("operation", OPERATIONS)
def test_twins_have_one_signature(operation):
    twins = [get_backend(name, torch.device("cuda")) for name in ("triton", "reference")]
    names, defaults = [], []
    for twin in twins:
        parameters = inspect.signature(getattr(twin, operation)).parameters.values()
        names.append([(p.name, p.kind) for p in parameters])
        defaults.append([p.default for p in parameters])
    assert names[0] == names[1]
    assert defaults[0] == defaults[1]
