"""Checks that the host functions share: an error names the argument, what was got, what was due."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)  # of the GPUs that convert it
MAX_HEAD_SIZE = 256  # of what is multiplied: a tile of rows lies in shared memory whole


def expect(ok: bool, name: str, got: object, expected: str) -> None:
    """Raise ValueError unless ok."""
    if not ok:
        raise ValueError(f"{name}: got {got}, expected {expected}")


def expect_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Exactly this shape."""
    expect(tuple(x.shape) == shape, name, f"shape {tuple(x.shape)}", f"{shape}")


def expect_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Exactly this dtype."""
    expect(x.dtype == dtype, name, f"dtype {x.dtype}", f"{dtype}")


def expect_like(name: str, x: Tensor, like: Tensor) -> None:
    """Of one shape, dtype and device."""
    if x.shape != like.shape or x.dtype != like.dtype or x.device != like.device:
        got, due = (f"{tuple(y.shape)} {y.dtype} on {y.device}" for y in (x, like))
        expect(False, name, got, due)


def expect_array(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.int32
) -> None:
    """A contiguous tensor of that shape and dtype."""
    expect_dtype(name, x, dtype)
    expect_shape(name, x, shape)
    expect(x.is_contiguous(), name, f"strides {x.stride()}", "a contiguous tensor")


def expect_float(name: str, x: Tensor, *, or_fp8: bool = False) -> None:
    """fp16, bf16 or fp32 with a contiguous last dimension; fp8 where that is said and the GPU has
    it, and the rest are refused."""
    floats = (*FLOATS, FP8) if or_fp8 else FLOATS
    if x.dtype not in floats:
        raise NotImplementedError(f"{name}: got dtype {x.dtype}, expected one of {floats}")
    if x.dtype == FP8 and x.is_cuda:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < FP8_CAPABILITY:
            got = f"got dtype {x.dtype} on a GPU of compute capability {capability}"
            raise NotImplementedError(f"{name}: {got}, expected {FP8_CAPABILITY} at least")
    expect(x.stride(-1) == 1, name, f"stride {x.stride(-1)} in the last dimension", "1")


def expect_descale(
    name: str, descale: Tensor | None, is_scaled: bool, shape: tuple[int, ...]
) -> None:
    """fp32 of that shape where fp8 rows are scaled by it, and None elsewhere."""
    if is_scaled and descale is not None:
        expect_array(name, descale, shape, torch.float32)
        return
    got = "None" if descale is None else "a tensor"
    expected = f"{shape} {torch.float32}, as rows are fp8" if is_scaled else "None: nothing is fp8"
    expect(is_scaled == (descale is not None), name, got, expected)


def expect_rows(block_table: Tensor | None, *, or_fp8: bool = False, **caches: Tensor) -> None:
    """Packed rows, or pages where there is a block table; all of one shape but for head sizes."""
    paged = block_table is not None
    layout = "[num_blocks, page_size, num_kv_heads, d]" if paged else "[total_k, num_kv_heads, d]"
    first, like = next(iter(caches.items()))
    for name, x in caches.items():
        got = f"shape {tuple(x.shape)}"
        expect(x.dim() == (4 if paged else 3), name, got, layout)
        expect_float(name, x, or_fp8=or_fp8)
        same = x.shape[:-1] == like.shape[:-1]
        expect(same, name, got, f"({tuple(like.shape[:-1])}, head size), as {first}")


def expect_queries(
    q: Tensor, block_table: Tensor | None, *, or_fp8: bool = False, **caches: Tensor
) -> None:
    """Query rows and caches to multiply them with: of one dtype, but where caches may be fp8; with
    heads in whole groups."""
    expect(q.dim() == 3, "q", f"shape {tuple(q.shape)}", "[total_q, num_heads, d]")
    expect_float("q", q)
    num_heads, d = q.shape[1:]
    expect_rows(block_table, or_fp8=or_fp8, **caches)
    for name, x in caches.items():
        if x.dtype != FP8:
            expect_dtype(name, x, q.dtype)
        num_kv_heads = x.shape[-2]
        multiple = num_kv_heads > 0 and num_heads % num_kv_heads == 0
        expect(multiple, name, f"{num_kv_heads} heads", f"a divisor of q's {num_heads} heads")
    for name, x in {**caches, "q": q}.items():
        if x.shape[-1] > MAX_HEAD_SIZE:
            got = f"got head size {x.shape[-1]}, expected at most {MAX_HEAD_SIZE}"
            raise NotImplementedError(f"{name}: {got}")
    d_k = caches["k"].shape[-1]
    expect(d_k == d, "k", f"head size {d_k}", f"{d}, as q")


def expect_per_sequence(num_seqs: int, **tensors: Tensor | None) -> None:
    """What is given of: starts (cu_...) and block tables of the sequences, or int32 of each."""
    for name, x in tensors.items():
        if x is None:
            continue
        if name.startswith("cu_"):
            expect_array(name, x, (num_seqs + 1,))
        elif name.endswith("block_table"):
            expect_array(name, x, (num_seqs, x.shape[-1]))
        else:
            expect_array(name, x, (num_seqs,))


def expect_starts(name: str, starts: Tensor | None, **instead: Tensor | None) -> None:
    """Starts (cu_...), which may be None where all of `instead` are given: nothing reads them."""
    if starts is None:
        unread = bool(instead) and all(x is not None for x in instead.values())
        expected = f"starts, or {' and '.join(instead)}" if instead else "starts"
        expect(unread, name, None, expected)


def expect_sinks(sinks: Tensor | None, q: Tensor, most_rows: int) -> None:
    """A logit of each query head: one row, or a number that divides most_rows, contiguous."""
    if sinks is None:
        return
    expect_same_device(q=q, sinks=sinks)
    num_heads = q.shape[1]
    got, rows = f"shape {tuple(sinks.shape)}", sinks.shape[0] if sinks.dim() == 2 else 1
    fits = sinks.dim() in (1, 2) and sinks.shape[-1] == num_heads
    fits = fits and rows > 0 and most_rows % rows == 0
    many = "" if most_rows == 1 else f" or (n, {num_heads}), n a divisor of {most_rows} sequences"
    expect(fits, "sinks", got, f"({num_heads},){many}")
    expect_float("sinks", sinks)
    expect(sinks.is_contiguous(), "sinks", f"strides {sinks.stride()}", "a contiguous tensor")


def expect_same_device(**tensors: Tensor | None) -> None:
    """All given tensors on one device, which can run Triton: CUDA, or the CPU interpreter."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first, device = next((name, x.device) for name, x in given.items())
    for name, x in given.items():
        expect(x.device == device, name, f"device {x.device}", f"{device}, as {first}")
    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"{first}: got device {device}, expected a CUDA device"
            " (or TRITON_INTERPRET=1, set before Triton is imported, to run on the CPU)"
        )


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU; it knows which values of TRITON_INTERPRET say so."""
    return triton.knobs.runtime.interpret
