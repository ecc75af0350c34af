"""compact_kv and compact_kv_ are exact to the bit, and write nothing but their rows.

What they refuse, and how they are launched, is in test_compact_launch.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import Case, assert_in_place, assert_out_of_place, kept_rows, pools, random_case
from support import NO_PAGE, assert_identical, cumulative, other_constants, vast_zeros
from torch import Tensor

from vlcache_triton.kernels import compact
from vlcache_triton.kernels.compact import COLUMN_BYTES, IN_PLACE_BYTES, compact_kv, compact_kv_

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize(
    ("d", "d_v"), [(64, 64), (80, 48), (96, 96), (128, 128), (256, 256), (48, 256), (1, 40)]
)
def test_head_sizes(device: torch.device, d: int, d_v: int, dtype: torch.dtype) -> None:
    case = random_case([63, 5], [30, 63, 1, 0], d=d, d_v=d_v, dtype=dtype, device=device)
    assert_out_of_place(case)
    assert_in_place(case, strided=True)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("lengths", [[1], [63], [111], [2000], [111, 1, 63]], ids=str)
def test_lengths_and_heads(device: torch.device, lengths: list[int], num_kv_heads: int) -> None:
    """Every head keeps a different number of tokens."""
    shares = [(h + 1) / (2 * num_kv_heads) for h in range(num_kv_heads)]
    counts = [-int(-n * share // 1) for n in lengths for share in shares]
    case = random_case(lengths, counts, num_kv_heads=num_kv_heads, d=64, device=device)
    assert_out_of_place(case)
    assert_in_place(case)


@pytest.mark.parametrize("page_size", [None, 1, 16, 100])
@pytest.mark.parametrize("out_page_size", [None, 1, 16, 100])
def test_pages(device: torch.device, page_size: int | None, out_page_size: int | None) -> None:
    """At either end and at both; unused entries of the block tables crash when they are read."""
    case = random_case(
        [130, 7, 0],
        [33, 120, 2, 7, 0, 0],
        page_size=page_size,
        dtype=BFLOAT if page_size == 16 else FLOAT,
        device=device,
    )
    assert_out_of_place(case, out_page_size)
    assert_out_of_place(case, out_page_size, strided=True)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_pages_in_place(device: torch.device, page_size: int, dtype: torch.dtype) -> None:
    case = random_case(
        [130, 7, 0], [33, 120, 2, 7, 0, 0], page_size=page_size, dtype=dtype, device=device
    )
    assert_in_place(case)
    assert_in_place(case, strided=True)


def live(lengths: list[int], num_kv_heads: int = 2) -> list[list[int]]:
    """Every second row of each segment."""
    return [list(range(0, n, 2)) for n in lengths for _ in range(num_kv_heads)]


CASES: dict[str, dict[str, Any]] = {
    "nothing of some": dict(lengths=[50, 0, 20], counts=[0, 0, 0, 0, 5, 5]),
    "nothing of all": dict(lengths=[50, 20], counts=[0] * 4),
    "all": dict(lengths=[100, 33], counts=[100, 100, 33, 33], dtype=BFLOAT),
    "all of some heads": dict(lengths=[100, 33], counts=[100, 1, 0, 33], dtype=FLOAT),
    "no sequences": dict(lengths=[], counts=[]),
    "no tokens": dict(lengths=[0, 0], counts=[0] * 4),
    "of a later layer": dict(lengths=[90, 20], counts=[41, 40, 9, 0], before=1000),
    "dead rows behind": dict(lengths=[90, 64], kept=live([60, 64]), used=[60, 64]),
    "dead pages behind": dict(lengths=[90, 64], kept=live([60, 9]), used=[60, 9], page_size=16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_out_of_place(device: torch.device, case: dict[str, Any]) -> None:
    assert_out_of_place(random_case(**case, device=device))
    assert_out_of_place(random_case(**case, device=device), 16)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_in_place(device: torch.device, case: dict[str, Any]) -> None:
    assert_in_place(random_case(**case, device=device))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
def test_rows_are_moved_not_computed_with(device: torch.device, dtype: torch.dtype) -> None:
    """Any bits at all: negative zeros, infinities, subnormals, NaN with their payloads."""
    case = random_case([300], [120, 200], d=80, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    for x in (case.k, case.v):
        noise = torch.randint(0, 256, (x.nbytes,), dtype=torch.uint8, generator=generator)
        x.copy_(noise.view(dtype).view(x.shape))
    assert_out_of_place(case)
    assert_in_place(case)


def test_k_and_v_may_differ_in_dtype(device: torch.device) -> None:
    case = random_case([200], [120, 70], d=128, d_v=64, device=device)
    case.v = case.v.float()
    assert_out_of_place(case)
    assert_in_place(case)


def test_max_kept_is_a_bound(device: torch.device) -> None:
    case = random_case([200, 9], [120, 3, 0, 9], device=device)
    out, again = pools(case), pools(case)
    for (x, starts, _), most in ((out, 120), (again, 5000)):
        options = case.selection | {"max_kept": most}
        compact_kv(case.k, case.v, out_k=x[0], out_v=x[1], cu_seqlens_out=starts, **options)
    assert_identical(out[0], again[0])


def test_pages_without_kept_rows_are_not_looked_up(device: torch.device) -> None:
    kept = [[*range(40, 44), *range(90, 96)], [47]]  # pages 2 and 5 of 7
    case = random_case([111], kept=kept, page_size=16, device=device)
    expected, starts, _ = pools(case)
    out = [x.clone() for x in expected]
    for x, pool in zip((case.k, case.v), expected, strict=True):
        for s, n in enumerate(case.counts):
            pool[starts[s] : starts[s] + n, 0] = kept_rows(case, x, s)
    assert case.block_table is not None
    case.block_table[0, [0, 1, 3, 4, 6]] = NO_PAGE
    compact_kv(case.k, case.v, out_k=out[0], out_v=out[1], cu_seqlens_out=starts, **case.selection)
    assert_identical(out, expected)


N = 1600
ROWS = IN_PLACE_BYTES // COLUMN_BYTES[0]  # of a tile in place
PATTERNS = {
    "all but the first": list(range(1, N)),
    "all but the last": list(range(N - 1)),
    "all but one in the middle": [*range(N // 2), *range(N // 2 + 1, N)],
    "every second": list(range(1, N, 2)),
    "the last few": list(range(N - 5, N)),
    "the last half": list(range(N // 2, N)),
    "just more than a tile, moved by one": list(range(1, ROWS + 2)),
    "a tile, moved by a tile": list(range(ROWS, 2 * ROWS)),
    "a tile and the one behind": list(range(ROWS - 1, 3 * ROWS)),
}


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("kept", PATTERNS.values(), ids=PATTERNS.keys())
def test_rows_move_over_rows_still_to_be_read(
    device: torch.device, kept: list[int], page_size: int | None
) -> None:
    case = random_case(
        [N, 3], kept=[kept, [0, 2]], num_kv_heads=1, d=16, page_size=page_size, device=device
    )
    assert_in_place(case)


def test_layouts_of_other_caches(device: torch.device) -> None:
    """[heads, tokens, d], and K and V side by side in one tensor."""
    case = random_case([111, 20], [30, 40, 20, 1], device=device)
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (case.k, case.v)]
    beside = torch.cat([case.k, case.v], -1).split(64, -1)
    expected, starts, _ = pools(case)
    options = dict(cu_seqlens_out=starts, **case.selection)
    compact_kv(case.k, case.v, out_k=expected[0], out_v=expected[1], **options)
    in_place = case.k.clone(), case.v.clone()
    compact_kv_(*in_place, **case.selection)
    for k, v in (by_head, beside):
        assert not k.is_contiguous()
        out, _, _ = pools(case)
        compact_kv(k, v, out_k=out[0], out_v=out[1], **options)
        assert_identical(out, expected)
        compact_kv_(k, v, **case.selection)
        assert_identical([k.contiguous(), v.contiguous()], in_place)


def vast_case(paged: bool, device: torch.device) -> tuple[Case, Tensor]:
    """32 live rows behind 2^31 elements, and all their rows `[rows, d]`."""
    rows, d, kept = 2**31 // 128 + 64, 128, [3, 8, 30, 31]
    vast = vast_zeros(rows * d, HALF, device).view(rows, d)
    vast[-40:].normal_(generator=torch.Generator(device).manual_seed(0))
    starts = cumulative([rows - 32, 32], device)[1:]
    indices = torch.tensor(kept, dtype=torch.int32, device=device)
    k, block_table = vast[:, None], None
    if paged:
        k = k.view(-1, 16, 1, d)
        block_table = torch.tensor([[rows // 16 - 2, rows // 16 - 1]], device=device).int()
    counts = cumulative([4], device)
    return Case([32], [kept], k, k, starts, block_table, indices, counts), vast


@pytest.mark.parametrize("paged", [False, True])
def test_past_2_to_the_31_elements(device: torch.device, paged: bool) -> None:
    """In the sources, and in place."""
    case, vast = vast_case(paged, device)
    expected = vast[-32:][case.kept[0]]
    out, starts, _ = pools(case)
    compact_kv(case.k, case.k, out_k=out[0], out_v=out[1], cu_seqlens_out=starts, **case.selection)
    first = int(starts[0])
    for x in out:
        assert_identical([x[first : first + 4, 0]], [expected])
        assert x[:first].isnan().all()
        assert x[first + 4 :].isnan().all()
    untouched = vast[-40:].clone()
    v = vast_zeros(case.k.numel(), HALF, device).view_as(case.k)
    compact_kv_(case.k, v, **case.selection)
    assert_identical([vast[-32:-28]], [expected])
    assert_identical([vast[-28:]], [untouched[12:]])
    assert_identical([vast[-40:-32]], [untouched[:8]])


@pytest.mark.parametrize("paged", [False, True])
def test_a_pool_past_2_to_the_31_elements(device: torch.device, paged: bool) -> None:
    case = random_case([90], [4, 5], d=128, device=device)
    rows = 2**31 // 128 + 64
    out_k, out_v = (vast_zeros(rows * 128, HALF, device).view(rows, 1, 128) for _ in range(2))
    starts, table, ends = cumulative([rows - 20, 10], device), None, [rows - 20, rows - 10]
    starts = torch.cat([starts[1:], starts[-1:] + 10])
    pool_k, pool_v = out_k, out_v
    if paged:
        pool_k, pool_v = (x.view(-1, 16, 1, 128) for x in (out_k, out_v))
        table = torch.tensor([[rows // 16 - 2], [rows // 16 - 1]], device=device).int()
        ends = [rows - 32, rows - 16]
    compact_kv(
        case.k,
        case.v,
        out_k=pool_k,
        out_v=pool_v,
        cu_seqlens_out=starts,
        out_block_table=table,
        **case.selection,
    )
    for x, out in ((case.k, out_k), (case.v, out_v)):
        for segment, (first, n) in enumerate(zip(ends, (4, 5), strict=True)):
            assert_identical([out[first : first + n, 0]], [kept_rows(case, x, segment)])
            assert (out[first + n : first + 10] == 0).all()


def test_runs_agree(device: torch.device) -> None:
    case = random_case([500, 111], [200, 300, 7, 100], device=device)
    first, second = ((case.k.clone(), case.v.clone()) for _ in range(2))
    for k, v in (first, second):
        compact_kv_(k, v, **case.selection)
    assert_identical(first, second)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_selection_is_gathered(data: st.DataObject) -> None:
    """With tiles so small that several of them make a segment."""
    num_kv_heads = data.draw(st.integers(1, 3), "num_kv_heads")
    lengths = data.draw(st.lists(st.integers(0, 90), max_size=3), "lengths")
    kept = [
        sorted(data.draw(st.sets(st.integers(0, n - 1)) if n else st.just(set()), "kept"))
        for n in lengths
        for _ in range(num_kv_heads)
    ]
    case = random_case(
        lengths,
        kept=kept,
        num_kv_heads=num_kv_heads,
        before=data.draw(st.integers(0, 3), "before"),
        page_size=data.draw(st.sampled_from([None, 1, 5]), "page_size"),
        d=16,
        device="cuda" if torch.cuda.is_available() else "cpu",
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    out_page_size = data.draw(st.sampled_from([None, 1, 7]), "out page size")
    multiprocessors = data.draw(st.sampled_from([1, 1000]), "multiprocessors")  # columns of 64, 32
    small = dict(TILE_BYTES=8 * 16 * 2, IN_PLACE_BYTES=8 * 64)
    with other_constants(compact, num_multiprocessors=lambda _: multiprocessors, **small):
        assert_out_of_place(case, out_page_size)
        assert_in_place(case)
