"""compact_kv and compact_kv_ are exact, whatever lies round the rows they move."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    FRAME,
    NO_PAGE,
    assert_frame_is_intact,
    cumulative,
    framed,
    random_block_table,
    random_varlen,
    vast_zeros,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlcache_triton import reference
from vlcache_triton.kernels import compact
from vlcache_triton.kernels.compact import compact_kv, compact_kv_

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
HEAD_ROOM = 3
NO_INDEX = torch.iinfo(torch.int32).max  # round a layer's indices: reading one would crash


@dataclass
class Case:
    """Sources, and what is to be kept of them.

    lengths: of each sequence. kept: `[num_seqs * num_kv_heads]` lists of ascending positions.
    k, v: packed, or pages where `block_table` is given.
    """

    lengths: list[int]
    kept: list[list[int]]
    k: Tensor
    v: Tensor
    cu_seqlens_k: Tensor
    block_table: Tensor | None
    indices: Tensor
    cu_kept: Tensor

    @property
    def counts(self) -> list[int]:
        return [len(x) for x in self.kept]

    @property
    def selection(self) -> dict[str, Any]:
        return dict(
            cu_seqlens_k=self.cu_seqlens_k,
            indices=self.indices,
            cu_kept=self.cu_kept,
            max_kept=max(self.counts, default=0),
            block_table=self.block_table,
        )


def random_case(
    lengths: list[int],
    counts: list[int] | None = None,
    *,
    kept: list[list[int]] | None = None,
    num_kv_heads: int = 2,
    before: int = 0,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **shapes: Any,
) -> Case:
    """`counts` rows of each segment at random, or those that `kept` names; the indices lie behind
    `before` others, as those of a later layer do."""
    generator = torch.Generator().manual_seed(seed)
    if kept is None:
        assert counts is not None
        places = [n for n in lengths for _ in range(num_kv_heads)]
        kept = [
            torch.randperm(n, generator=generator)[:count].sort().values.tolist()
            for n, count in zip(places, counts, strict=True)
        ]
    batch = random_varlen(
        [0] * len(lengths),
        lengths,
        num_heads=num_kv_heads,
        num_kv_heads=num_kv_heads,
        device=device,
        seed=seed,
        **shapes,
    )
    flat = [NO_INDEX] * before + [j for segment in kept for j in segment] + [NO_INDEX] * 5
    indices = torch.tensor(flat, dtype=torch.int32, device=device)
    cu_kept = cumulative([len(x) for x in kept], device) + before
    return Case(
        lengths, kept, batch.k, batch.v, batch.cu_seqlens_k, batch.block_table, indices, cu_kept
    )


def rows_of(cu_seqlens: Tensor, block_table: Tensor | None, page_size: int, i: int, n: int):
    """Flat rows of the first n logical rows of sequence i, by hand."""
    if block_table is None:
        start = int(cu_seqlens[i])
        return [start + j for j in range(n)]
    pages = block_table[i].tolist()
    return [pages[j // page_size] * page_size + j % page_size for j in range(n)]


def kept_rows(case: Case, x: Tensor, segment: int) -> Tensor:
    """`[kept, d]`, what the segment keeps of k or v."""
    i, head = divmod(segment, x.shape[-2])
    size = x.shape[1] if x.dim() == 4 else 1
    rows = rows_of(case.cu_seqlens_k, case.block_table, size, i, case.lengths[i])
    flat = x.reshape(-1, *x.shape[-2:])
    return flat[[rows[j] for j in case.kept[segment]], head]


def pools(case: Case, page_size: int | None) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Empty out_k and out_v, segment starts, block table: all segments with head room."""
    capacities = [n + HEAD_ROOM for n in case.counts]
    starts = cumulative(capacities, case.k.device)
    table, shape = None, (int(starts[-1]),)
    if page_size is not None:
        table = random_block_table(capacities, page_size, case.k.device, seed=5)
        shape = (int((table != NO_PAGE).sum()) + 1, page_size)
    return [x.new_full((*shape, 1, x.shape[-1]), FRAME) for x in (case.k, case.v)], starts, table


def assert_out_of_place(case: Case, page_size: int | None = None) -> None:
    """As gathered by hand, and as the reference has it; all else in the pools is as before."""
    out, starts, table = pools(case, page_size)
    expected = [x.clone() for x in out]
    for x, pool in zip((case.k, case.v), expected, strict=True):
        for segment, count in enumerate(case.counts):
            rows = rows_of(starts, table, page_size or 1, segment, count)
            pool.view(-1, pool.shape[-1])[rows] = kept_rows(case, x, segment)
    stock = [x.clone() for x in out]
    sources = case.k.clone(), case.v.clone()
    for function, target in ((compact_kv, out), (reference.compact_kv, stock)):
        (out_k, k_frame), (out_v, v_frame) = (framed(x) for x in target)
        if function is reference.compact_kv:
            out_k, out_v = target
        result = function(
            case.k,
            case.v,
            out_k=out_k,
            out_v=out_v,
            cu_seqlens_out=starts,
            out_block_table=table,
            **case.selection,
        )
        assert result is None
        for got, right in zip((out_k, out_v), expected, strict=True):
            assert torch.equal(got, right)
        assert_frame_is_intact(k_frame)
        assert_frame_is_intact(v_frame)
    assert_same_bits((case.k, case.v), sources)


def assert_in_place(case: Case) -> None:
    """As gathered by hand first and put back then; all else is as before, bit for bit."""
    expected = case.k.clone(), case.v.clone()
    for x, target in zip((case.k, case.v), expected, strict=True):
        size = x.shape[1] if x.dim() == 4 else 1
        for segment, count in enumerate(case.counts):
            i, head = divmod(segment, x.shape[-2])
            rows = rows_of(case.cu_seqlens_k, case.block_table, size, i, count)
            target.view(-1, *x.shape[-2:])[rows, head] = kept_rows(case, x, segment)
    stock = case.k.clone(), case.v.clone()
    reference.compact_kv_(*stock, **case.selection)
    assert_same_bits(stock, expected)
    (k, k_frame), (v, v_frame) = framed(case.k), framed(case.v)
    assert compact_kv_(k, v, **case.selection) is None
    assert_same_bits((k, v), expected)
    assert_frame_is_intact(k_frame)
    assert_frame_is_intact(v_frame)


def assert_same_bits(actual, expected) -> None:
    """Equal, NaN included."""
    for a, b in zip(actual, expected, strict=True):
        bits = torch.int32 if a.dtype == torch.float32 else torch.int16
        assert torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


CASES: dict[str, dict[str, Any]] = {
    "one row": dict(lengths=[1], counts=[1, 1]),
    "63": dict(lengths=[63], counts=[6, 6], dtype=BFLOAT),
    "111, 1, 63": dict(lengths=[111, 1, 63], counts=[50, 50, 1, 1, 33, 33], d=128),
    "2000": dict(lengths=[2000], counts=[777], num_kv_heads=1, d=16),
    "heads of their own": dict(
        lengths=[300, 40], counts=[1, 299, 7, 33, 0, 40, 12, 3], num_kv_heads=4, d=16
    ),
    "8 heads": dict(lengths=[70, 30], counts=[40] * 8 + [3] * 8, num_kv_heads=8, d=64, dtype=FLOAT),
    "nothing of some": dict(lengths=[50, 0, 20], counts=[0, 0, 0, 0, 5, 5], d=80),
    "nothing of all": dict(lengths=[50, 20], counts=[0] * 4),
    "all": dict(lengths=[100, 33], counts=[100, 100, 33, 33], d=96, dtype=BFLOAT),
    "no sequences": dict(lengths=[], counts=[]),
    "head sizes 80 and 48": dict(lengths=[90], counts=[41, 41], d=80, d_v=48),
    "head sizes 48 and 256": dict(lengths=[90], counts=[41, 41], d=48, d_v=256, dtype=FLOAT),
    "head sizes 1 and 40": dict(lengths=[90], counts=[41, 41], d=1, d_v=40),
    "of a later layer": dict(lengths=[90, 20], counts=[41, 41, 9, 9], before=1000, d=16),
    "dead rows behind": dict(lengths=[90, 64], counts=[40, 40, 5, 5], used=[60, 64], dead=True),
    "pages of 1": dict(lengths=[90, 7], counts=[40, 40, 2, 2], page_size=1, dtype=BFLOAT),
    "pages of 16": dict(lengths=[90, 7], counts=[33, 40, 2, 7], page_size=16, d=128, dtype=FLOAT),
    "pages of 100": dict(lengths=[290, 7], counts=[3, 280, 2, 7], page_size=100, d=80, before=9),
}


def made(case: dict[str, Any], device: torch.device) -> Case:
    case = dict(case)
    if case.pop("dead", False):  # what is kept lies among the live rows
        live, per_head = case["used"], len(case["counts"]) // len(case["used"])
        kept = [
            list(range(0, live[s // per_head], 2))[:n] for s, n in enumerate(case.pop("counts"))
        ]
        case["kept"] = kept
    return random_case(**case, device=device)


@pytest.mark.parametrize("page_size", [None, 1, 16, 100])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_out_of_place(device: torch.device, case: dict[str, Any], page_size: int | None) -> None:
    assert_out_of_place(made(case, device), page_size)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_in_place(device: torch.device, case: dict[str, Any]) -> None:
    assert_in_place(made(case, device))


N = 1000
PATTERNS = {
    "all but the first": list(range(1, N)),
    "all but the last": list(range(N - 1)),
    "all but one in the middle": [*range(N // 2), *range(N // 2 + 1, N)],
    "every second": list(range(1, N, 2)),
    "the last few": list(range(N - 5, N)),
    "the last half": list(range(N // 2, N)),
    "just more than a tile, moved by one": list(range(1, compact.ROWS_IN_PLACE + 2)),
    "a tile, moved by a tile": list(range(compact.ROWS_IN_PLACE, 2 * compact.ROWS_IN_PLACE)),
}


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("kept", PATTERNS.values(), ids=PATTERNS.keys())
def test_rows_move_over_rows_still_to_be_read(
    device: torch.device, kept: list[int], page_size: int | None
) -> None:
    case = random_case([N, 3], kept=[kept, [0, 2]], num_kv_heads=1, d=16, page_size=page_size)
    assert_in_place(case)


def test_in_place_makes_no_second_copy(device: torch.device, monkeypatch) -> None:
    """A launch on the cache's own memory is all there is: no tensor is made."""
    case = random_case([200, 30], [20] * 4, device=device)
    places = case.k.data_ptr(), case.v.data_ptr()
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: seen.append(arguments)

    monkeypatch.setattr(compact, "_compact_in_place_kernel", Kernel())
    with Allocations() as made:
        compact_kv_(case.k, case.v, **case.selection)
    assert sum(made.sizes) < case.k.nbytes // 100
    assert (seen[0]["k_ptr"].data_ptr(), seen[0]["v_ptr"].data_ptr()) == places


class Allocations(TorchDispatchMode):
    """The bytes of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.sizes += [x.nbytes for x in (result,) if isinstance(x, Tensor)]
        return result


@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_strides_change_nothing(device: torch.device, dtype: torch.dtype) -> None:
    """[heads, tokens, d] caches, and K and V side by side in one tensor."""
    case = random_case([111, 20], [30, 40, 20, 1], d=64, dtype=dtype, device=device)
    out, starts, _ = pools(case, None)
    compact_kv(case.k, case.v, out_k=out[0], out_v=out[1], cu_seqlens_out=starts, **case.selection)
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (case.k, case.v)]
    beside = torch.cat([case.k, case.v], -1).split(64, -1)
    for k, v in (by_head, beside):
        assert not k.is_contiguous()
        again = [torch.full_like(x, FRAME) for x in out]
        selection = case.selection
        compact_kv(k, v, out_k=again[0], out_v=again[1], cu_seqlens_out=starts, **selection)
        assert torch.equal(again[0], out[0]) and torch.equal(again[1], out[1])
        compact_kv_(k, v, **selection)
        for segment, count in enumerate(case.counts):
            i, head = divmod(segment, 2)
            start = int(case.cu_seqlens_k[i])
            pool = int(starts[segment])
            assert torch.equal(k[start : start + count, head], out[0][pool : pool + count, 0])
            assert torch.equal(v[start : start + count, head], out[1][pool : pool + count, 0])


def test_a_pool_with_strides(device: torch.device) -> None:
    """K and V of the pool as halves of one tensor."""
    case = random_case([111], [30, 40], device=device)
    out, starts, _ = pools(case, None)
    joint = torch.full((len(out[0]), 1, 128), FRAME, dtype=HALF, device=device)
    halves = joint.split(64, -1)
    for k, v in (out, halves):
        compact_kv(case.k, case.v, out_k=k, out_v=v, cu_seqlens_out=starts, **case.selection)
    assert torch.equal(halves[0], out[0]) and torch.equal(halves[1], out[1])


@pytest.mark.parametrize("paged", [False, True])
def test_past_2_to_the_31_elements(device: torch.device, paged: bool) -> None:
    """The second sequence lies behind so many of them, in the sources as in the pool."""
    d, rows = 128, 2**31 // 128 + 64
    vast = vast_zeros(rows * d, HALF, device)
    k = vast.view(rows, 1, d)
    k[-40:].normal_(generator=torch.Generator(device).manual_seed(0))
    block_table = None
    if paged:
        k, block_table = k.view(-1, 16, 1, d), torch.tensor([[rows // 16 - 2, rows // 16 - 1]])
        block_table = block_table.int().to(device)
        starts, places = cumulative([32], device), range(rows - 32, rows)
    else:
        starts, places = cumulative([rows - 32, 32], device)[1:], range(rows - 32, rows)
    kept = [3, 8, 30, 31]
    indices = torch.tensor(kept, dtype=torch.int32, device=device)
    out = [k.new_full((9, 1, d), FRAME) for _ in range(2)]
    selection = dict(
        cu_seqlens_k=starts,
        indices=indices,
        cu_kept=cumulative([4], device),
        max_kept=4,
        block_table=block_table,
    )
    expected = vast.view(rows, d)[[places[j] for j in kept]].clone()
    compact_kv(k, k, out_k=out[0], out_v=out[1], cu_seqlens_out=starts * 0 + 2, **selection)
    for x in out:
        assert (
            torch.equal(x[2:6, 0], expected) and (x[6:] == FRAME).all() and (x[:2] == FRAME).all()
        )
    first, others = (vast_zeros(rows * d, HALF, device).view(rows, 1, d) for _ in range(2))
    behind = cumulative([rows - 9, 9], device)[1:]
    compact_kv(k, k, out_k=first, out_v=others, cu_seqlens_out=behind, **selection)
    assert torch.equal(first[-9:-5, 0], expected) and not first[-5:].any()
    compact_kv_(k, k.clone() if device.type == "cuda" else others.view_as(k), **selection)
    assert torch.equal(vast.view(rows, d)[-32:-28], expected)


def test_runs_agree(device: torch.device) -> None:
    case = random_case([500, 111], [200, 300, 7, 100], device=device)
    first, second = [(case.k.clone(), case.v.clone()) for _ in range(2)]
    for k, v in (first, second):
        compact_kv_(k, v, **case.selection)
    assert_same_bits(first, second)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_selection_is_gathered(data) -> None:
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
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    assert_out_of_place(case, data.draw(st.sampled_from([None, 1, 7]), "out page size"))
    assert_in_place(case)


FP8 = torch.float8_e4m3fn
BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "k: got shape": (ValueError, dict(k=torch.zeros(90, 2).half())),
    "k: got dtype": (NotImplementedError, dict(k=torch.zeros(90, 2, 64).to(FP8))),
    "k: got stride": (ValueError, dict(k=torch.zeros(90, 2, 128).half()[..., ::2])),
    "v: got device meta": (ValueError, dict(v=torch.zeros(90, 2, 64, device="meta"))),
    "v: got shape .91": (ValueError, dict(v=torch.zeros(91, 2, 64).half())),
    "v: got dtype": (NotImplementedError, dict(v=torch.zeros(90, 2, 64).int())),
    "cu_seqlens_k: got no elements": (ValueError, dict(cu_seqlens_k=torch.zeros(0).int())),
    "cu_seqlens_k: got dtype": (ValueError, dict(cu_seqlens_k=torch.zeros(2).long())),
    "cu_kept: got shape": (ValueError, dict(cu_kept=torch.zeros(2).int())),
    "cu_kept: got dtype": (ValueError, dict(cu_kept=torch.zeros(3).long())),
    "indices: got shape": (ValueError, dict(indices=torch.zeros(2, 9).int())),
    "indices: got dtype": (ValueError, dict(indices=torch.zeros(9).long())),
    "block_table: got shape": (ValueError, dict(block_table=torch.zeros(3).int(), paged=True)),
    "block_table: got dtype": (ValueError, dict(block_table=torch.zeros(1, 9), paged=True)),
}
BAD_OUT: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "out_k: got shape": (ValueError, dict(out_k=torch.zeros(50, 2, 64).half())),
    "out_k: got dtype": (ValueError, dict(out_k=torch.zeros(50, 1, 64))),
    "out_k: got stride": (ValueError, dict(out_k=torch.zeros(50, 1, 128).half()[..., ::2])),
    "out_v: got shape .49": (ValueError, dict(out_v=torch.zeros(49, 1, 64).half())),
    "out_v: got shape .50, 1, 63": (ValueError, dict(out_v=torch.zeros(50, 1, 63).half())),
    "out_v: got device meta": (ValueError, dict(out_v=torch.zeros(50, 1, 64, device="meta"))),
    "cu_seqlens_out: got shape": (ValueError, dict(cu_seqlens_out=torch.zeros(2).int())),
    "cu_seqlens_out: got dtype": (ValueError, dict(cu_seqlens_out=torch.zeros(3).long())),
    "out_k: got shape .50, 1, 64": (ValueError, dict(out_block_table=torch.zeros(2, 9).int())),
}


def refusal_arguments(device: torch.device, change: dict[str, Any]) -> dict[str, Any]:
    case = random_case([90], [20, 22], device=device)
    change = dict(change)
    arguments = dict(k=case.k, v=case.v, **case.selection)
    if change.pop("paged", False):
        arguments |= dict(k=case.k[:, None], v=case.v[:, None])
    return arguments | {
        k: x if x.device.type == "meta" else x.to(device) for k, x in change.items()
    }


@pytest.mark.parametrize(("name", "error", "change"), [(k, *v) for k, v in (BAD | BAD_OUT).items()])
def test_refusals_name_the_argument(device: torch.device, name: str, error, change) -> None:
    """And nothing has been written by then."""
    out = [torch.full((50, 1, 64), FRAME, dtype=HALF, device=device) for _ in range(2)]
    pool = dict(out_k=out[0], out_v=out[1], cu_seqlens_out=cumulative([25, 25], device))
    arguments = refusal_arguments(device, change)
    with pytest.raises(error, match=f"^{name}"):
        compact_kv(**(pool | arguments))
    assert all((x == FRAME).all() for x in out)


@pytest.mark.parametrize(("name", "error", "change"), [(k, *v) for k, v in BAD.items()])
def test_refusals_in_place(device: torch.device, name: str, error, change) -> None:
    arguments = refusal_arguments(device, change)
    before = {k: arguments[k].clone() for k in "kv" if arguments[k].device.type != "meta"}
    with pytest.raises(error, match=f"^{name}"):
        compact_kv_(**arguments)
    for k, x in before.items():
        now = arguments[k].contiguous().view(torch.uint8)
        assert torch.equal(now, x.contiguous().view(torch.uint8))


def test_grids_grow_with_what_is_kept(device: torch.device, monkeypatch) -> None:
    """By tiles of kept rows out of place; in place by columns alone. Lengths compile nothing new:
    they are no constants of either kernel."""
    grids, constants = [], []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda **arguments: constants.append(
                {k: x for k, x in arguments.items() if k.isupper() or k.startswith("num_warps")}
            )

    monkeypatch.setattr(compact, "_compact_kernel", Kernel())
    monkeypatch.setattr(compact, "_compact_in_place_kernel", Kernel())
    for length, count in [(90, 20), (2000, 20), (2000, 1999)]:
        case = random_case([length], [count, 1], d=64, device=device)
        out, starts, _ = pools(case, None)
        compact_kv(
            case.k, case.v, out_k=out[0], out_v=out[1], cu_seqlens_out=starts, **case.selection
        )
        compact_kv_(case.k, case.v, **case.selection)
    assert grids[0::2] == [(2, 1), (2, 1), (2, -(-1999 // compact.ROWS))]
    assert grids[1::2] == [(2, 2 * 64 * 2 // compact.COLUMN_BYTES)] * 3
    assert constants[0::2] == [constants[0]] * 3 and constants[1::2] == [constants[1]] * 3


def test_segments_lie_one_behind_the_other() -> None:
    """Of the tests' own making: what the pools above are compared with."""
    case = random_case([9, 4], [3, 2, 4, 0])
    _, starts, _ = pools(case, None)
    assert [b - a for a, b in pairwise(starts.tolist())] == [6, 5, 7, 3]
