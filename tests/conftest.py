"""Without CUDA, Triton's interpreter (set before Triton loads), and no tests marked `gpu`."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def form_reader():
    """(model, processor): the embedded model, loaded once; no test alters it."""
    from vlcache_triton.formreader import load_form_reader

    return load_form_reader()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
