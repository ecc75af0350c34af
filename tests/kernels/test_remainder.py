"""Sums of what is evicted, and the row that stands for it: exact, and of these rows alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import Case, pools, random_case, rows_of
from support import (
    Operators,
    assert_frame_is_intact,
    assert_identical,
    cumulative,
    framed,
    other_constants,
    random_block_table,
)
from torch import Tensor

from vlcache_triton.kernels import reference, remainder
from vlcache_triton.kernels.remainder import CHUNK, store_means, sum_evicted

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def with_whole_numbers(case: Case, used: list[int] | None = None) -> Case:
    """Small whole numbers, whose sums are exact in any order; NaN where nothing is to be read."""
    generator = torch.Generator().manual_seed(1)
    live = case.lengths if used is None else used
    for x in (case.k, case.v):
        x.copy_(torch.randint(-8, 9, x.shape, generator=generator))
        flat, page_size = x.view(-1, *x.shape[-2:]), x.shape[1] if x.dim() == 4 else 1
        is_read = torch.zeros(flat.shape[:2], dtype=torch.bool)
        for segment, kept in enumerate(case.kept):
            i, head = divmod(segment, x.shape[-2])
            rows = rows_of(case.cu_seqlens_k, case.block_table, page_size, i, live[i])
            is_read[[rows[j] for j in range(live[i]) if j not in set(kept)], head] = True
        flat[~is_read.to(x.device)] = torch.nan
    return case


def evicted_rows(case: Case, x: Tensor, segment: int, live: list[int]) -> Tensor:
    """`[evicted, d]` fp64, one at a time."""
    i, head = divmod(segment, x.shape[-2])
    page_size = x.shape[1] if x.dim() == 4 else 1
    rows = rows_of(case.cu_seqlens_k, case.block_table, page_size, i, live[i])
    evicted = [rows[j] for j in range(live[i]) if j not in set(case.kept[segment])]
    return x.reshape(-1, *x.shape[-2:])[evicted, head].double()


def sums_of(
    function: Any, case: Case, used: list[int] | None = None, **options: Any
) -> list[Tensor]:
    """`[num_segments, d]` of k and v by either implementation."""
    if used is not None:
        options["seqused_k"] = torch.tensor(used, dtype=torch.int32, device=case.k.device)
    longest = max(case.lengths, default=0)
    arguments = (case.cu_seqlens_k, case.indices, case.cu_kept, longest)
    sums = function(case.k, case.v, *arguments, block_table=case.block_table, **options)
    for x, of in zip(sums, (case.k, case.v), strict=True):
        assert x.dtype == torch.float32 and x.shape[::2] == (len(case.kept), of.shape[-1])
        assert x.isfinite().all()
    return [x.sum(1) for x in sums]


def assert_exact(case: Case, used: list[int] | None = None) -> None:
    """Both implementations, on whole numbers, against rows that are added up one at a time."""
    case = with_whole_numbers(case, used)
    live = case.lengths if used is None else used
    for function in (sum_evicted, reference.sum_evicted):
        for x, sums in zip((case.k, case.v), sums_of(function, case, used), strict=True):
            for segment in range(len(case.kept)):
                expected = evicted_rows(case, x, segment, live).sum(0)
                assert torch.equal(sums[segment].double(), expected)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize(
    ("d", "d_v"), [(64, 64), (80, 48), (96, 96), (128, 128), (256, 256), (48, 256), (1, 40)]
)
def test_head_sizes(device: torch.device, d: int, d_v: int, dtype: torch.dtype) -> None:
    assert_exact(random_case([63, 5], [30, 63, 1, 0], d=d, d_v=d_v, dtype=dtype, device=device))


@pytest.mark.parametrize("num_kv_heads", [1, 8])
@pytest.mark.parametrize("lengths", [[1], [2000], [111, 1, 63]], ids=str)
def test_lengths_and_heads(device: torch.device, lengths: list[int], num_kv_heads: int) -> None:
    shares = [(h + 1) / (2 * num_kv_heads) for h in range(num_kv_heads)]
    counts = [-int(-n * share // 1) for n in lengths for share in shares]
    assert_exact(random_case(lengths, counts, num_kv_heads=num_kv_heads, d=32, device=device))


CASES: dict[str, dict[str, Any]] = {
    "nothing kept": dict(lengths=[50, 0, 20], counts=[0] * 6),
    "all kept": dict(lengths=[100, 33], counts=[100, 100, 33, 33], dtype=BFLOAT),
    "all kept of some heads": dict(lengths=[100, 33], counts=[100, 1, 0, 33], dtype=FLOAT),
    "no sequences": dict(lengths=[], counts=[]),
    "no tokens": dict(lengths=[0, 0], counts=[0] * 4),
    "of a later layer": dict(lengths=[90, 20], counts=[41, 40, 9, 0], before=1000),
    "all of a chunk kept": dict(lengths=[3 * CHUNK], kept=[[*range(CHUNK, 2 * CHUNK)], []]),
    "only the ends of chunks kept": dict(
        lengths=[2 * CHUNK + 1], kept=[[0, CHUNK - 1, CHUNK, 2 * CHUNK], [CHUNK, 2 * CHUNK - 1]]
    ),
}


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_selections(device: torch.device, case: dict[str, Any], page_size: int | None) -> None:
    assert_exact(random_case(**case, page_size=page_size, device=device))


@pytest.mark.parametrize("page_size", [None, 16])
def test_live_rows_alone_count(device: torch.device, page_size: int | None) -> None:
    """What lies behind them may be anything, NaN included; kept positions are among them."""
    kept = [[3, 40], [], [0], [8]]
    case = random_case([300, 64], kept=kept, page_size=page_size, device=device)
    assert_exact(case, used=[280, 9])


def test_strides(device: torch.device) -> None:
    """K and V as views into something larger."""
    case = random_case([100, 33], [50, 7, 0, 33], d=80, d_v=48, device=device)
    expected = sums_of(sum_evicted, case)
    (case.k, _), (case.v, _) = framed(case.k), framed(case.v)
    assert_identical(sums_of(sum_evicted, case), expected)


def test_as_precise_as_fp32(device: torch.device) -> None:
    case = random_case([5000], [500, 40], d=64, device=device)
    for x, sums, plain in zip(
        (case.k, case.v),
        sums_of(sum_evicted, case),
        sums_of(reference.sum_evicted, case),
        strict=True,
    ):
        exact = torch.stack([evicted_rows(case, x, s, case.lengths).sum(0) for s in range(2)])
        error, allowed = ((y.double() - exact).abs().max() for y in (sums, plain))
        assert error <= 2 * allowed + 1e-5


def test_a_sequence_sums_the_same_in_any_batch(device: torch.device) -> None:
    """To the bit: chunks are of one size, and added up in their order."""
    shapes = dict(num_kv_heads=1, d=32, dtype=FLOAT, device=device)
    alone = random_case([700], [90], **shapes)
    both = random_case([700, 2000], [90, 0], **shapes)
    both.k[:700], both.v[:700] = alone.k, alone.v
    both.indices[:90] = alone.indices[:90]
    for single, batch in zip(
        *(
            sum_evicted(c.k, c.v, c.cu_seqlens_k, c.indices, c.cu_kept, max(c.lengths))
            for c in (alone, both)
        ),
        strict=True,
    ):
        assert_identical([single[0]], [batch[0, : single.shape[1]]])
        assert not batch[0, single.shape[1] :].any()


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("page_size", [None, 1, 7])
@pytest.mark.parametrize("num_sums", [1, 70])
def test_means_are_stored_as_first_rows(device, page_size, num_sums: int, dtype) -> None:
    """And nothing else is written: not where nothing was evicted, and not beside a row."""
    case = random_case([9] * 3, [4, 0, 2, 9, 1, 5], d=80, d_v=48, dtype=dtype, device=device)
    out, starts, table = pools(case, page_size)
    counts = torch.tensor([3, 0, 1, 2**20, 0, 7], dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(0)
    sums = [
        torch.randint(-900, 900, (6, num_sums, x.shape[-1]), generator=generator).float().to(device)
        for x in out
    ]
    expected = [x.clone() for x in out]
    for x, total in zip(expected, sums, strict=True):
        for segment, count in enumerate(counts.tolist()):
            if count:
                (row,) = rows_of(starts, table, page_size or 1, segment, 1)
                mean = total[segment].double().sum(0) / count
                x.view(-1, x.shape[-1])[row] = mean.to(dtype)
    stock, views = [x.clone() for x in out], [framed(x) for x in out]
    reference.store_means(*sums, counts, *stock, starts, out_block_table=table)
    store_means(*sums, counts, views[0][0], views[1][0], starts, out_block_table=table)
    for plain, (view, frame), exact in zip(stock, views, expected, strict=True):
        for x in (plain, view):
            torch.testing.assert_close(x, exact, equal_nan=True)
            assert torch.equal(x.isnan(), exact.isnan())
        assert_frame_is_intact(frame)


def test_the_host_launches_and_does_nothing_else(device: torch.device) -> None:
    """No copy, no sync: what it makes are the sums."""
    case = random_case([300], [50, 9], device=device)
    out, starts, _ = pools(case)
    counts = torch.tensor([250, 291], dtype=torch.int32, device=device)
    arguments = (case.cu_seqlens_k, case.indices, case.cu_kept, 300)
    with (
        mock.patch.multiple(
            remainder, _sum_evicted_kernel=mock.MagicMock(), _store_means_kernel=mock.MagicMock()
        ),
        Operators() as operators,
    ):
        sums = sum_evicted(case.k, case.v, *arguments)
        store_means(*sums, counts, *out, starts)
    assert {name.partition(".")[0] for name in operators.names} <= {"new_empty", "empty", "fill_"}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_kept_and_evicted_make_the_whole(data: st.DataObject) -> None:
    """With chunks so small that several of them make a segment."""
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
    )
    small = dict(CHUNK=data.draw(st.sampled_from([8, 24]), "chunk"), SUMS_BYTES=4 * 16 * 8)
    with other_constants(remainder, **small):
        assert_exact(case)


def arguments(**changes: Any) -> dict[str, Any]:
    usual = dict(
        k=torch.zeros(9, 2, 64).half(),
        v=torch.zeros(9, 2, 32).half(),
        cu_seqlens_k=cumulative([4, 5]),
        indices=torch.zeros(3).int(),
        cu_kept=cumulative([1, 0, 1, 1]),
        max_seqlen_k=5,
    )
    return usual | changes


BAD_SUMS = {
    "k:": (ValueError, dict(k=torch.zeros(9, 64).half())),
    "k: got dtype": (NotImplementedError, dict(k=torch.zeros(9, 2, 64).to(torch.float8_e4m3fn))),
    "v: got shape": (ValueError, dict(v=torch.zeros(8, 2, 32).half())),
    "indices": (ValueError, dict(indices=torch.zeros(3))),
    "cu_kept": (ValueError, dict(cu_kept=cumulative([1, 0, 1]))),
    "cu_seqlens_k": (ValueError, dict(cu_seqlens_k=torch.tensor([0, 4, 9]))),
    "seqused_k": (ValueError, dict(seqused_k=torch.zeros(3).int())),
    "block_table": (
        ValueError,
        dict(
            k=torch.zeros(2, 5, 2, 64).half(),
            v=torch.zeros(2, 5, 2, 32).half(),
            block_table=torch.zeros(2, 1),
        ),
    ),
}


@pytest.mark.parametrize(("name", "error", "change"), [(k, *v) for k, v in BAD_SUMS.items()])
def test_refused_sums_name_the_argument(device, name: str, error, change: dict[str, Any]) -> None:
    given = {
        key: x.to(device) if torch.is_tensor(x) else x for key, x in arguments(**change).items()
    }
    with pytest.raises(error, match=f"^{name}"):
        sum_evicted(**given)


BAD_MEANS = {
    "sum_k": (ValueError, dict(sum_k=torch.zeros(4, 64))),
    "sum_k: got dtype": (ValueError, dict(sum_k=torch.zeros(4, 2, 64).half())),
    "sum_v": (ValueError, dict(sum_v=torch.zeros(4, 3, 32))),
    "counts": (ValueError, dict(counts=torch.zeros(4))),
    "out_k": (ValueError, dict(out_k=torch.zeros(20, 1, 32).half())),
    "out_v: got dtype": (NotImplementedError, dict(out_v=torch.zeros(20, 1, 32).double())),
    "cu_seqlens_out": (ValueError, dict(cu_seqlens_out=cumulative([1, 1]))),
}


@pytest.mark.parametrize(("name", "error", "change"), [(k, *v) for k, v in BAD_MEANS.items()])
def test_refused_means_name_the_argument(device, name: str, error, change: dict[str, Any]) -> None:
    usual = dict(
        sum_k=torch.zeros(4, 2, 64),
        sum_v=torch.zeros(4, 2, 32),
        counts=torch.zeros(4).int(),
        out_k=torch.zeros(20, 1, 64).half(),
        out_v=torch.zeros(20, 1, 32).half(),
        cu_seqlens_out=cumulative([5] * 4),
    )
    given = {key: x.to(device) for key, x in (usual | change).items()}
    with pytest.raises(error, match=f"^{name}"):
        store_means(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("page_size", [None, 16])
def test_large(device: torch.device, dtype: torch.dtype, page_size: int | None) -> None:
    lengths = [32768, 5001]
    counts = [n // 10 - h for n in lengths for h in range(4)]
    shapes = dict(num_kv_heads=4, d=128, dtype=dtype, page_size=page_size, device=device)
    case = random_case(lengths, counts, **shapes)
    for x in (case.k, case.v):
        x.copy_(torch.randint(-8, 9, x.shape, device=device))
    assert_identical(sums_of(sum_evicted, case), sums_of(reference.sum_evicted, case))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 16])
def test_a_graph_replays_with_other_selections(device, page_size: int | None) -> None:
    lengths, most = [700, 64], 64
    shapes = dict(d=128, page_size=page_size, device=device)
    case = random_case(lengths, [most] * 4, **shapes)
    for x in (case.k, case.v):
        x.copy_(torch.randint(-8, 9, x.shape, device=device))
    out = [x.new_zeros(40, 1, x.shape[-1]) for x in (case.k, case.v)]
    starts = cumulative([10] * 4, device)
    live = torch.tensor(lengths, dtype=torch.int32, device=device)
    counts = torch.zeros(4, dtype=torch.int32, device=device)
    options = dict(seqused_k=live, block_table=case.block_table)

    def step() -> None:
        places = (case.cu_seqlens_k, case.indices, case.cu_kept, 700)
        store_means(*sum_evicted(case.k, case.v, *places, **options), counts, *out, starts)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, which a capture may not
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed, kept in enumerate([[60, 64, 10, 64], [1, 0, 64, 3], [64] * 4]):
        other = random_case(lengths, kept, seed=seed, **shapes)
        case.indices[: sum(kept)] = other.indices[: sum(kept)]
        case.cu_kept.copy_(other.cu_kept)
        evicted = [lengths[s // 2] - n for s, n in enumerate(kept)]
        counts.copy_(torch.tensor(evicted))
        for x in out:
            x.zero_()
        graph.replay()
        for x, pool in zip((case.k, case.v), out, strict=True):
            for s, (first, _) in enumerate(pairwise(starts.tolist())):
                case.kept = other.kept
                total = evicted_rows(case, x, s, lengths).sum(0)
                expected = total / evicted[s] if evicted[s] else total
                torch.testing.assert_close(pool[first, 0].double(), expected, rtol=2e-3, atol=1e-3)


@pytest.mark.gpu
def test_lengths_compile_nothing_new(device: torch.device) -> None:
    kernels = (remainder._sum_evicted_kernel, remainder._store_means_kernel)

    def compiled() -> int:
        return sum(len(x.device_caches[device.index or 0][0]) for x in kernels)

    def run(n: int, layer: int = 0) -> None:
        case = random_case([n, n], [n // 2 + 1, n, 1, 0], before=layer, device=device)
        out, starts, _ = pools(case)
        starts, case.cu_kept = (
            torch.cat([x.new_zeros(layer), x])[layer:] for x in (starts, case.cu_kept)
        )
        arguments = (case.cu_seqlens_k, case.indices, case.cu_kept, n)
        counts = torch.ones(4 + layer, dtype=torch.int32, device=device)[layer:]
        store_means(*sum_evicted(case.k, case.v, *arguments), counts, *out, starts)

    run(30)
    before = compiled()
    for n in (1, 16, 63, 64, 65, 111, 2000, 2048, 10000):
        run(n)
        run(n, layer=n % 7 + 1)
    assert compiled() == before


@pytest.mark.gpu
def test_past_2_to_the_31_elements(device: torch.device) -> None:
    far = 2**31 // 64 + 1000
    k = torch.zeros(far + 333, 1, 64, dtype=HALF, device=device)
    k[far:] = 1
    table = torch.arange(far, far + 333, dtype=torch.int32, device=device)[None]
    kept = torch.tensor([0, 5, 300], dtype=torch.int32, device=device)
    starts = torch.tensor([far, far + 333], dtype=torch.int32, device=device)
    for x, options in ((k, {}), (k[:, None], dict(block_table=table))):
        sums = sum_evicted(x, x, starts, kept, cumulative([3], device), 333, **options)
        assert (sums[0].sum(1) == 330).all() and (sums[1].sum(1) == 330).all()


def test_the_table_of_a_paged_pool_is_looked_up(device: torch.device) -> None:
    table = random_block_table([20, 20], 4, device, seed=3)
    out = torch.full((11, 4, 1, 16), torch.nan, device=device)
    sums = torch.ones(2, 1, 16, device=device)
    counts = torch.tensor([1, 2], dtype=torch.int32, device=device)
    store_means(sums, sums, counts, out, out.clone(), cumulative([]), out_block_table=table)
    assert (out[table[0, 0].item(), 0] == 1).all() and (out[table[1, 0].item(), 0] == 0.5).all()
    assert int(out.isfinite().all(-1).sum()) == 2
