"""The launch heuristics of scoring and selection: pure functions, so no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from vlcache_triton.kernels.launch import MAX_SIGNATURES, once_per_signature, padded
from vlcache_triton.kernels.score import MAX_SPLITS, RowPass, column_pass_launch, row_pass_launch
from vlcache_triton.kernels.select import select_launch

H100 = 132  # multiprocessors
LENGTHS = (1, 63, 111, 2000, 2048, 32768, 131072, 10**6)


def rows(
    tau: int = 50, n: int = 32768, *, d: int = 128, itemsize: int = 2, group: int = 4, seqs: int = 1
) -> RowPass:
    """The row pass of `seqs` sequences at 8 KV heads."""
    return row_pass_launch(d, itemsize, group, 8, tau * seqs, tau, n, H100)


def compiled(launch: RowPass) -> tuple[int, ...]:
    return launch.BLOCK_M, launch.BLOCK_N, launch.num_warps, launch.num_stages


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("d", [8, 64, 80, 96, 128, 256])
def test_lengths_compile_nothing_new(d: int, itemsize: int) -> None:
    for tau in (1, 16, 50, 2000):
        assert len({compiled(rows(tau, n, d=d, itemsize=itemsize)) for n in LENGTHS}) == 1
    taus = {compiled(rows(tau, d=d, itemsize=itemsize)) for tau in range(1, 300)}
    assert len(taus) <= 2


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("tau", [1, 50, 2000])
@pytest.mark.parametrize("seqs", [1, 64])
def test_splits_cover_the_keys_once(n: int, tau: int, seqs: int) -> None:
    launch = rows(tau, n, seqs=seqs)
    assert 1 <= launch.num_splits <= MAX_SPLITS
    assert launch.split_size % launch.BLOCK_N == 0
    assert (launch.num_splits - 1) * launch.split_size < n <= launch.num_splits * launch.split_size
    assert launch.num_row_blocks * launch.BLOCK_M >= tau * 4


@pytest.mark.parametrize("tau", [1, 50])
@pytest.mark.parametrize("n", [2048, 32768, 131072])
def test_one_prompt_fills_the_gpu(n: int, tau: int) -> None:
    launch = rows(tau, n)
    programs = launch.num_row_blocks * launch.num_splits * 8
    assert 0.8 * 2 * H100 <= programs <= 2 * H100


def test_many_rows_need_no_splits() -> None:
    assert rows(2000, 8192, seqs=16).num_splits == 1


def test_nothing_to_do_still_launches_what_initialises() -> None:
    launch = rows(0, 0)
    assert (launch.num_row_blocks, launch.num_splits) == (1, 1)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16, 71, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_hold_whole_groups(group: int, itemsize: int) -> None:
    """A row of q and all heads of its group lie in one block, whose size is a power of two."""
    row, column = rows(group=group, itemsize=itemsize), column_pass_launch(128, itemsize, group)
    for block in (row.BLOCK_M, row.BLOCK_N, column.BLOCK_M, column.SMALL_M, column.BLOCK_N):
        assert block & (block - 1) == 0
    assert min(row.BLOCK_M, column.BLOCK_M, column.SMALL_M) >= group
    assert column.BLOCK_M % column.SMALL_M == 0


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_shared_memory_fits_small_gpus(d: int, itemsize: int) -> None:
    """99 KiB is what a block may have on sm_86 and sm_89, the least of what Triton supports."""
    row, column = rows(d=d, itemsize=itemsize), column_pass_launch(d, itemsize, 4)
    row_bytes = padded(d) * itemsize
    assert (row.BLOCK_M + row.num_stages * row.BLOCK_N) * row_bytes <= 99 * 1024
    assert (column.BLOCK_N + column.num_stages * column.BLOCK_M) * row_bytes <= 99 * 1024


@pytest.mark.parametrize(("d", "expected"), [(1, 16), (16, 16), (64, 64), (80, 128), (256, 256)])
def test_padded(d: int, expected: int) -> None:
    assert padded(d) == expected


def test_select_has_two_launches() -> None:
    assert len({select_launch(n) for n in range(1, 300000, 500)}) == 2
    for n in LENGTHS:
        launch = select_launch(n)
        assert launch.BLOCK % (32 * launch.num_warps) == 0


def test_what_a_signature_decides_is_found_out_once() -> None:
    calls: list[tuple] = []

    @once_per_signature
    def prepare(x: torch.Tensor, y: torch.Tensor | None, *, n: int) -> int:
        calls.append((x.shape, n))
        if n < 0:
            raise ValueError("n")
        return len(calls)

    x, y = torch.zeros(2, 3), torch.zeros(4)
    assert [prepare(x, y, n=1), prepare(x + 1, y.clone(), n=1)] == [1, 1]
    others = [(x.double(), y, 1), (x.t(), y, 1), (x[:1], y, 1), (x, None, 1), (x, y[::2], 1)]
    others += [(x, y, 2), (x, y.to("meta"), 1)]
    for a, b, n in others:
        found = len(calls)
        assert prepare(a, b, n=n) == prepare(a, b, n=n) == found + 1
    for _ in range(2):  # an error is never remembered
        found = len(calls)
        with pytest.raises(ValueError, match="n"):
            prepare(x, y, n=-1)
        assert len(calls) == found + 1


def test_signatures_are_forgotten_before_they_fill_the_memory() -> None:
    prepare = once_per_signature(lambda x, *, n: [n])
    x = torch.zeros(1)
    first = prepare(x, n=0)
    for n in range(MAX_SIGNATURES - 1):
        prepare(x, n=n)
    assert prepare(x, n=0) is first
    prepare(x, n=MAX_SIGNATURES)
    prepare(x, n=MAX_SIGNATURES + 1)
    assert prepare(x, n=0) is not first
