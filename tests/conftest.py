"""Without CUDA, Triton's interpreter (set before Triton loads), and no tests marked `gpu`."""

import os

import numpy as np
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


@pytest.fixture(scope="session", autouse=True)
def interpreted_casts():
    """Triton's interpreter (3.4 to 3.9) rounds to fp8 (e4m3) wrongly: mantissas lose their carry,
    subnormals are cut off, ties go up; it reads the codes of NaN as 480, and cuts off what bf16 has
    no bits for. A GPU does what torch does, so here torch does it."""
    if torch.cuda.is_available():
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_fp_to_fp, cast_impl = InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.cast_impl

    def rounded(src, dst_type, dtype, bits, stored):
        values = torch.from_numpy(np.ascontiguousarray(src.data)).to(dtype).view(bits).numpy()
        return TensorHandle(values.view(stored), dst_type.scalar)

    def create_exact_fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar == tl.float8e4nv and src.dtype.scalar == tl.float32:
            return rounded(src, dst_type, torch.float8_e4m3fn, torch.uint8, np.uint8)
        result = create_fp_to_fp(self, src, dst_type, rounding_mode)
        if src.dtype.scalar == tl.float8e4nv:
            result.data[src.data & 127 == 127] = (
                0x7FC0 if dst_type.scalar == tl.bfloat16 else torch.nan
            )
        return result

    def exact_cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return rounded(src, dst_type, torch.bfloat16, torch.int16, np.uint16)
        return cast_impl(self, src, dst_type)

    InterpreterBuilder.create_fp_to_fp = create_exact_fp_to_fp
    InterpreterBuilder.cast_impl = exact_cast_impl
    yield
    InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.cast_impl = create_fp_to_fp, cast_impl


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
