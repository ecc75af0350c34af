"""What the kernel tests share: random variable-length and paged inputs, and the error bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

NO_PAGE = torch.iinfo(torch.int32).max  # fills unused block table entries: reading one crashes


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
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    used: Sequence[int] | None = None,
    page_size: int | None = None,
    seed: int = 0,
) -> Varlen:
    """Normal q, k and v. `used` gives live lengths below lengths_k; `page_size` makes pages."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q = normal(sum(lengths_q), num_heads, d)
    k = normal(sum(lengths_k), num_kv_heads, d)
    v = normal(sum(lengths_k), num_kv_heads, d)
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


def assert_identical(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Two lists or named tuples of tensors are equal, bit for bit."""
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} entries differ"
