"""What the kernel tests share: random variable-length and paged inputs, and the error bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlcache_triton.kernels import reference

NO_PAGE = torch.iinfo(torch.int32).max  # fills unused block table entries: reading one crashes
FRAME = 7.0  # what lies round a framed tensor

# The interpreter warns of what attention means: log2(0) where no key is seen, exp2 in the softcap.
MEANT_INFINITIES = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]


@dataclass
class Varlen:
    """A packed or paged batch; rows of k and v that no live key owns are NaN."""

    q: Tensor  # [total_q, num_heads, d]
    k: Tensor  # [total_k, num_kv_heads, d], or pages [num_blocks, page_size, num_kv_heads, d]
    v: Tensor  # as k
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_k: Tensor | None
    block_table: Tensor | None

    @property
    def cache(self) -> dict[str, Tensor | None]:
        """The keyword arguments that say where the live keys are."""
        return {"seqused_k": self.seqused_k, "block_table": self.block_table}


def cumulative(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """`[len(lengths) + 1]` int32 starts."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def random_varlen(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    d: int = 64,
    d_v: int | None = None,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    used: Sequence[int] | None = None,
    page_size: int | None = None,
    seed: int = 0,
) -> Varlen:
    """Normal q, k and v. `used` gives live lengths below lengths_k; `page_size` makes pages.

    d_v: head size of v, default d.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q = normal(sum(lengths_q), num_heads, d)
    k = normal(sum(lengths_k), num_kv_heads, d)
    v = normal(sum(lengths_k), num_kv_heads, d if d_v is None else d_v)
    cu_seqlens_k = cumulative(lengths_k, device)
    live = lengths_k if used is None else used
    for i, start in enumerate(cu_seqlens_k[:-1].tolist()):
        k[start + live[i] : start + lengths_k[i]] = torch.nan
        v[start + live[i] : start + lengths_k[i]] = torch.nan
    block_table = None
    if page_size is not None:
        block_table = random_block_table(lengths_k, page_size, device, seed)
        k, v = (to_pages(x, cu_seqlens_k, block_table, page_size) for x in (k, v))
    return Varlen(
        q,
        k,
        v,
        cumulative(lengths_q, device),
        cu_seqlens_k,
        max(lengths_q, default=0),
        max(lengths_k, default=0),
        None if used is None else torch.tensor(used, dtype=torch.int32, device=device),
        block_table,
    )


def random_block_table(
    lengths: Sequence[int], page_size: int, device: torch.device | str = "cpu", seed: int = 0
) -> Tensor:
    """`[num_seqs, max_blocks]` int32: each page has one owner, in shuffled order; one is unused."""
    blocks = [-(-n // page_size) for n in lengths]
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(sum(blocks) + 1, generator=generator).int()
    table = torch.full((len(lengths), max(blocks, default=0)), NO_PAGE, dtype=torch.int32)
    for row, n, start in zip(table, blocks, cumulative(blocks).tolist(), strict=False):
        row[:n] = pages[start : start + n]
    return table.to(device)


def to_pages(x: Tensor, cu_seqlens: Tensor, block_table: Tensor, page_size: int) -> Tensor:
    """Packed rows `[total, heads, d]` as pages `[num_blocks, page_size, heads, d]`, else NaN."""
    num_blocks = int((block_table != NO_PAGE).sum()) + 1
    pages = x.new_full((num_blocks * page_size, *x.shape[1:]), torch.nan)
    starts = cu_seqlens.tolist()
    for i, (start, end) in enumerate(pairwise(starts)):
        position = torch.arange(end - start, device=x.device)
        block = block_table[i, position // page_size].long()
        pages[block * page_size + position % page_size] = x[start:end]
    return pages.view(num_blocks, page_size, *x.shape[1:])


def sequences(batch: Varlen) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The query rows, live keys and their values of each sequence, `[num_heads, n, d]`."""
    q, k, v = batch.q, batch.k, batch.v
    live = batch.cu_seqlens_k.diff() if batch.seqused_k is None else batch.seqused_k
    for i, (start, end) in enumerate(pairwise(batch.cu_seqlens_q.tolist())):
        rows = torch.arange(int(live[i]), device=q.device)
        if batch.block_table is None:
            rows += batch.cu_seqlens_k[i]
        else:
            pages, page_size = batch.block_table[i], k.shape[1]
            rows = pages[rows // page_size].long() * page_size + rows % page_size
        keys, values = (
            x.reshape(-1, *x.shape[-2:])[rows]
            .transpose(0, 1)
            .repeat_interleave(q.shape[1] // x.shape[-2], 0)
            for x in (k, v)
        )
        yield q[start:end].transpose(0, 1), keys, values


def visible_keys(
    n_q: int,
    n_k: int,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    device: torch.device | str = "cpu",
) -> Tensor:
    """`[n_q, n_k]` bool, the keys that each of the last n_q rows sees."""
    rows = torch.arange(n_k - n_q, n_k, device=device)[:, None]
    distance = torch.arange(n_k, device=device) - rows  # of a key behind the row's own
    left, right = window_size[0], 0 if causal else window_size[1]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    return visible


def plain_attention(
    batch: Varlen,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    first_key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int = 0,
) -> Tensor:
    """`[total_q, num_heads, d_v]` by plain torch in the dtype of the inputs, in one piece."""
    scale = batch.q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    parts = [batch.q.new_empty(0, batch.q.shape[1], batch.v.shape[-1])]  # of no sequences
    for i, (q, k, v) in enumerate(sequences(batch)):
        hidden = ~visible_keys(q.shape[1], k.shape[1], causal, window_size, q.device)
        logits = q @ k.mT * scale
        if softcap > 0:
            logits = torch.tanh(logits / softcap) * softcap
        if first_key_bias is not None:
            num_kv_heads = batch.k.shape[-2]
            bias = first_key_bias[i * num_kv_heads : (i + 1) * num_kv_heads].to(logits.dtype)
            logits[:, :, :1] += bias.repeat_interleave(len(q) // num_kv_heads)[:, None, None]
        logits = logits.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            rows = sinks.view(-1, len(q)).to(logits.dtype)
            sink = rows[i % len(rows)][:, None, None].expand(-1, q.shape[1], 1)
            weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        weights = weights.masked_fill(hidden, 0.0)
        parts.append((weights @ v).transpose(0, 1))
    return torch.cat(parts)


def run_decode(function: Any, batch: Varlen, **options: Any) -> Any:
    """Either implementation on a batch, causal unless told; gives the log-sum-exp as well."""
    return function(
        batch.q,
        batch.k,
        batch.v,
        batch.cu_seqlens_q,
        batch.cu_seqlens_k,
        batch.max_seqlen_q,
        batch.max_seqlen_k,
        **(batch.cache | {"causal": True, "return_softmax_lse": True} | options),
    )


def assert_decode_accurate(actual: Any, batch: Varlen, **options: Any) -> None:
    """Output within twice the error of plain torch, log-sum-exp to fp32's precision."""
    out, lse = actual
    expected, expected_lse = run_decode(
        reference.varlen_decode, replace(batch, q=batch.q.float()), **options
    )
    assert out.dtype == batch.q.dtype
    assert_accurate(out, plain_attention(batch, **options), expected)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)


def vast_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """More elements than int32 can number; on the CPU, pages never touched take no memory."""
    if device.type == "cpu":
        size = torch.finfo(dtype).bits // 8
        return torch.from_numpy(np.zeros(numel * size, np.uint8)).view(dtype)
    needed = numel * torch.finfo(dtype).bits // 8
    free, _ = torch.cuda.mem_get_info(device)
    if free < needed + 2**30:
        pytest.skip(
            f"needs {needed / 2**30:.0f} GiB and some of GPU memory, {free / 2**30:.0f} are free"
        )
    return torch.zeros(numel, dtype=dtype, device=device)


def framed(x: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of x as a strided view into the middle of a larger tensor, and that tensor."""
    frame = x.new_full([n + 2 for n in x.shape], FRAME)
    inside = frame[tuple(slice(1, n + 1) for n in x.shape)]
    return inside.copy_(x), frame


def assert_frame_is_intact(frame: Tensor) -> None:
    """Nothing round the tensor that `framed` made was written."""
    border = frame.clone()
    border[tuple(slice(1, n - 1) for n in frame.shape)] = FRAME
    assert (border == FRAME).all()


def assert_accurate(
    actual: Tensor, same_dtype: Tensor, expected: Tensor, *, floor: float = 1e-5
) -> None:
    """At most twice the error of plain torch in the inputs' dtype, in maximum and in RMS.

    Args:
        actual: what the kernel computed.
        same_dtype: the same by plain torch in the dtype of the inputs.
        expected: the fp32 reference.
        floor: absolute error that is always allowed, since plain torch may happen to be exact.
    """
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error, allowed = ((x.double() - expected.double()).abs() for x in (actual, same_dtype))
    if not error.numel():
        return
    worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    assert error.max() <= 2 * allowed.max() + floor, (
        f"error {error.max():.3g} at {worst}, plain torch {allowed.max():.3g}"
    )
    rms, allowed_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
    assert rms <= 2 * allowed_rms + floor, f"RMS error {rms:.3g}, plain torch {allowed_rms:.3g}"


def bits(x: Tensor) -> Tensor:
    """The bit patterns of x, which compare equal where NaN does not."""
    if not x.is_floating_point():
        return x
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_identical(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Two lists or named tuples of tensors are equal, bit for bit."""
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = bits(a), bits(b)
        assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} entries differ"


def other_constants(module: ModuleType, **values: Any) -> Any:
    """A block where a module's constants are others, and what they decide is not remembered."""
    prepare = {n: f.__wrapped__ for n, f in vars(module).items() if n.startswith("_prepare")}
    assert prepare
    return mock.patch.multiple(module, **values, **prepare)


class Recorder:
    """Takes a kernel's place and keeps what it would have been launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []
        self.arguments: list[dict[str, Any]] = []

    def run(self, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> None:
        self.grids.append(grid)
        self.arguments.append(arguments)

    @property
    def constants(self) -> list[dict[str, Any]]:
        """What Triton compiles for, of each launch."""
        return [
            {k: v for k, v in x.items() if k.isupper() or k.startswith("num_warps")}
            for x in self.arguments
        ]


class Operators(TorchDispatchMode):
    """The names of all torch operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))
