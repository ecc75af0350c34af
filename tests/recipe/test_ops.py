"""The seam: a caller names its arithmetic, and nothing falls back silently."""

import inspect

import pytest
import torch
import triton  # noqa: F401 (it loads with the environment as it is before tests change it)
from prompts import CPU

from vlcache_triton.kernels import reference
from vlcache_triton.ops import Backend, get_backend

OPERATIONS = Backend._fields[1:]


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


@pytest.mark.parametrize("setting", [None, "0", "false", "off", ""])
def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch, setting):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if setting is not None:
        monkeypatch.setenv("TRITON_INTERPRET", setting)
    with pytest.raises(ValueError, match=r"^backend: got 'triton' for a model on cpu"):
        get_backend("triton", CPU)


@pytest.mark.parametrize("setting", ["1", "true", "TRUE", "on", "yes", "y"])
def test_what_triton_takes_for_true_asks_for_its_interpreter(monkeypatch, setting):
    monkeypatch.setenv("TRITON_INTERPRET", setting)
    assert get_backend("triton", CPU).name == "triton"


@pytest.mark.parametrize(("name", "device"), [("triton", "cuda"), ("auto", "cuda")])
def test_triton_serves_cuda(name, device):
    backend = get_backend(name, torch.device(device))
    assert backend.name == "triton"
    for operation in OPERATIONS:
        assert getattr(backend, operation).__module__.startswith("vlcache_triton.kernels.")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_twins_are_called_alike(operation):
    """A kernel may take more, where that may be left out (a workspace that is kept)."""
    kernel, twin = (
        inspect.signature(getattr(get_backend(name, torch.device("cuda")), operation)).parameters
        for name in ("triton", "reference")
    )
    shared = [name for name in kernel if name in twin]
    assert shared == list(twin)
    for name in twin:
        assert (kernel[name].kind, kernel[name].default) == (twin[name].kind, twin[name].default)
    for name in kernel.keys() - twin.keys():
        assert kernel[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert kernel[name].default is None
