"""fp8 (e4m3) K and V: codes are torch's to the bit, wherever they are written.

A code is the nearest to row / descale, ties to even, saturating. What is attended to is in
test_fp8_decode.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import Case, kept_rows, pools, random_case, rows_of
from support import (
    MEANT_INFINITIES,
    Varlen,
    assert_frame_is_intact,
    assert_identical,
    cumulative,
    framed,
    random_block_table,
    random_varlen,
    to_pages,
)
from torch import Tensor

from vlcache_triton.kernels import append, checks, compact, reference
from vlcache_triton.kernels.append import append_kv
from vlcache_triton.kernels.compact import compact_kv, compact_layers
from vlcache_triton.kernels.descales import kept_descales
from vlcache_triton.kernels.fp8 import quantised
from vlcache_triton.kernels.remainder import store_means

FP8, HALF, BFLOAT, FLOAT = torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32

pytestmark = [
    *MEANT_INFINITIES,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < checks.FP8_CAPABILITY,
        reason="needs compute capability 8.9",
    ),
]


def codes_of(rows: Tensor, descale: Tensor | float) -> Tensor:
    """What must be stored."""
    return (rows.float() / descale).clamp(-448, 448).to(FP8)


# The conversions themselves: of the interpreter as conftest.py mends it, or of the GPU.


@triton.jit
def _quantise_kernel(x_ptr, descale_ptr, codes_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(codes_ptr + at, quantised(tl.load(x_ptr + at), tl.load(descale_ptr)))


@triton.jit
def _convert_kernel(codes_ptr, x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x_ptr + at, tl.load(codes_ptr + at).to(x_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
def test_every_code_is_read_as_torch_reads_it(device: torch.device, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(FP8)
    x = torch.zeros(256, dtype=dtype, device=device)
    _convert_kernel[(1,)](codes, x, 256)
    expected = codes.to(dtype)
    assert torch.equal(x.isnan(), expected.isnan()) and x.isnan().sum() == 2
    assert_identical([x.nan_to_num()], [expected.nan_to_num()])


def hard_numbers() -> Tensor:
    """All codes, the middles between them and their neighbours in fp32, what overflows, and bits at
    random: `[16384]`."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    codes = codes[codes.isfinite()].sort().values
    middles = (codes[1:] + codes[:-1]) / 2
    near = [torch.nextafter(middles, torch.tensor(sign * 1e9)) for sign in (1.0, -1.0)]
    large = torch.tensor([448.0, 449.0, 464.0, 480.0, 1e9, 3e38, torch.inf])
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (8000,), generator=generator).int().view(FLOAT)
    small = torch.randn(4000, generator=generator) * 2.0**-7
    parts = torch.cat([codes, middles, *near, large, -large, random.nan_to_num(0.0), small])
    return torch.cat([parts, torch.randn(2**14 - len(parts), generator=generator) * 100])


@pytest.mark.parametrize("descale", [1.0, 3.0, 0.0371, 2.0**-20, 1e30])
def test_every_rounding_is_torch_s(device: torch.device, descale: float) -> None:
    x = (hard_numbers() * descale).to(device)
    codes = torch.zeros(len(x), dtype=FP8, device=device)
    scale = torch.tensor([descale], device=device)
    _quantise_kernel[(4,)](x, scale, codes, len(x) // 4)
    assert_identical([codes], [codes_of(x, scale)])
    assert not codes.isnan().any()


@pytest.mark.gpu
def test_conversions_are_those_of_the_gpu(device: torch.device) -> None:
    """For run_gpu.sh, which runs what is marked."""
    test_every_code_is_read_as_torch_reads_it(device, BFLOAT)
    test_every_rounding_is_torch_s(device, 0.0371)


# Scales: of the kept rows alone.


def expected_descales(case: Case, x: Tensor) -> Tensor:
    """`[num_segments, 1]`, from the definition."""
    parts = []
    for segment in range(len(case.kept)):
        rows = kept_rows(case, x, segment).float()
        amax = rows.abs().max() if len(rows) else torch.zeros(())
        parts.append(amax * (2 / 448) if amax > 0 else torch.ones(()))
    return torch.tensor(parts, device=x.device)[:, None]


def only_kept(case: Case) -> Case:
    """NaN wherever nothing may be read."""
    for x in (case.k, case.v):
        kept = torch.zeros(x.shape[:-1], dtype=torch.bool).view(-1, x.shape[-2])
        page_size = x.shape[1] if x.dim() == 4 else 1
        for segment, positions in enumerate(case.kept):
            i, head = divmod(segment, x.shape[-2])
            rows = rows_of(case.cu_seqlens_k, case.block_table, page_size, i, case.lengths[i])
            kept[[rows[j] for j in positions], head] = True
        x.view(-1, *x.shape[-2:])[~kept.to(x.device)] = torch.nan
    return case


def selection_of(case: Case) -> dict[str, Any]:
    return {name: x for name, x in case.selection.items() if name != "cu_seqlens_k"}


def descales_of(function: Any, *cases: Case) -> tuple[Tensor, Tensor]:
    """Of several layers that keep the same."""
    first, n = cases[0], len(cases)
    counts = cumulative(first.counts * n, first.k.device) + first.cu_kept[0]
    start = int(first.cu_kept[0])
    kept = first.indices[start : int(first.cu_kept[-1])]
    indices = torch.cat([first.indices[:start], *[kept] * n])
    options = selection_of(first) | dict(indices=indices, cu_kept=counts)
    return function([x.k for x in cases], [x.v for x in cases], first.cu_seqlens_k, **options)


CASES: dict[str, dict[str, Any]] = {
    "odd lengths": dict(lengths=[1, 63, 111], counts=[1, 1, 30, 63, 0, 111], dtype=BFLOAT),
    "2000 rows": dict(lengths=[2000], counts=[70, 700], d=64, dtype=BFLOAT),
    "head sizes 80 and 48": dict(lengths=[63, 5], counts=[30, 63, 1, 0], d=80, d_v=48),
    "head size 256": dict(lengths=[33], counts=[30, 3], d=256, dtype=FLOAT),
    "head sizes 1 and 40": dict(lengths=[33], counts=[30, 3], d=1, d_v=40),
    "8 heads": dict(lengths=[70], counts=list(range(8)), num_kv_heads=8, dtype=FLOAT),
    "nothing kept": dict(lengths=[50, 0], counts=[0] * 4),
    "no sequences": dict(lengths=[], counts=[]),
    "of a later layer": dict(lengths=[90, 20], counts=[41, 40, 9, 0], before=1000),
    "pages of 1": dict(lengths=[90, 20], counts=[41, 40, 9, 0], page_size=1, dtype=BFLOAT),
    "pages of 16": dict(lengths=[90, 20], counts=[41, 40, 9, 0], page_size=16, d=96),
}


@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES.keys())
def test_descales(device: torch.device, shapes: dict[str, Any]) -> None:
    """Of one layer, and of several; nothing but kept rows is read."""
    case = only_kept(random_case(**shapes, device=device))
    expected = [expected_descales(case, x) for x in (case.k, case.v)]
    twice = replace(case, k=case.k * 2, v=case.v * -2)
    doubled = [expected_descales(twice, x) for x in (twice.k, twice.v)]
    for function in (kept_descales, reference.kept_descales):
        for actual, descale in zip(descales_of(function, case), expected, strict=True):
            assert actual.dtype == FLOAT and actual.is_contiguous()
            assert_identical([actual], [descale[None]])
        if case.block_table is not None:
            bare = replace(case, cu_seqlens_k=None)
            assert_identical(descales_of(function, bare), descales_of(function, case))
        both = descales_of(function, case, twice)
        for actual, *layers in zip(both, expected, doubled, strict=True):
            assert_identical([actual], [torch.stack(layers)])


def test_descales_of_extremes(device: torch.device) -> None:
    """Zeros, an outlier, the least subnormal, and what would underflow; always a number above 0."""
    case = random_case([4], [4] * 6, num_kv_heads=6, d=16, dtype=FLOAT, device=device)
    case.k[:, 0], case.k[:, 1], case.k[:, 2] = 0.0, -0.0, 1e-45
    case.k[2, 3, 7], case.k[:, 4] = -3e38, 2.0**-130
    for function in (kept_descales, reference.kept_descales):
        k_descale, _ = descales_of(function, case)
        tiny = torch.finfo(FLOAT).tiny
        outlier = torch.tensor(3e38) * (2 / 448)
        expected = torch.tensor([1.0, 1.0, tiny, outlier, tiny], device=device)
        assert_identical([k_descale[0, :5, 0]], [expected])
    assert codes_of(case.k[:, 3], k_descale[0, 3, 0]).float()[2, 7] == -224


def test_layers_may_lie_apart_strided_and_unaligned(device: torch.device) -> None:
    case = random_case([40, 9], [30, 9, 0, 4], d=24, d_v=16, dtype=FLOAT, device=device)
    expected = descales_of(reference.kept_descales, *[case] * 3)
    strided = replace(case, k=torch.cat([case.k, case.k], -1)[..., :24])
    flat = torch.cat([case.v.new_zeros(1), case.v.flatten()])
    unaligned = replace(case, v=flat[1:].view_as(case.v))
    assert_identical(descales_of(kept_descales, case, strided, unaligned), expected)


# Compaction, means and appends: codes to the bit, and nothing else is written.


def fp8_pools(case: Case, page_size: int | None = None) -> tuple[list[Tensor], Tensor, Any]:
    out, starts, table = pools(case, page_size)
    return [x.to(FP8) for x in out], starts, table


def written(x: Tensor) -> Tensor:
    """fp8 as bytes, of which framed can be made."""
    return x.view(torch.uint8)


@pytest.mark.parametrize(
    ("name", "out_page_size"),
    [*((name, None) for name in CASES), ("odd lengths", 16), ("pages of 16", 16)],
)
def test_compaction_quantises(device: torch.device, name: str, out_page_size: int | None) -> None:
    case = random_case(**CASES[name], device=device)
    case.k *= 3.7
    descales = [x[0] for x in descales_of(kept_descales, case)]
    if case.counts and case.counts[0]:
        descales[0][0] *= 0.1  # as little as would saturate
    out, starts, table = fp8_pools(case, out_page_size)
    expected = [x.clone() for x in out]
    for x, pool, descale in zip((case.k, case.v), expected, descales, strict=True):
        for segment, count in enumerate(case.counts):
            rows = rows_of(starts, table, out_page_size or 1, segment, count)
            codes = codes_of(kept_rows(case, x, segment), descale[segment])
            assert not codes.isnan().any()
            pool.view(-1, pool.shape[-1])[rows] = codes
    options = dict(cu_seqlens_out=starts, out_block_table=table, **case.selection)
    options |= dict(k_descale=descales[0], v_descale=descales[1])
    stock, views = [x.clone() for x in out], [framed(written(x)) for x in out]
    reference.compact_kv(case.k, case.v, out_k=stock[0], out_v=stock[1], **options)
    pool_k, pool_v = (view.view(FP8) for view, _ in views)
    compact_kv(case.k, case.v, out_k=pool_k, out_v=pool_v, **options)
    assert_identical(stock, expected)
    assert_identical([pool_k.contiguous(), pool_v.contiguous()], expected)
    for _, frame in views:
        assert_frame_is_intact(frame)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_layers_are_quantised_each_by_its_own(device: torch.device, num_layers: int) -> None:
    cases = [
        random_case([40, 9], [30, 9, 0, 4], d=24, d_v=16, seed=i, device=device)
        for i in range(num_layers)
    ]
    generator = torch.Generator().manual_seed(0)
    k_descale, v_descale = torch.rand(2, num_layers, 4, 1, generator=generator).to(device)
    counts = cases[0].counts
    starts = torch.stack([cumulative([n + 2 for n in counts]) + 60 * i for i in range(num_layers)])
    starts = starts.to(device)
    kept = [x.indices[: sum(counts)] for x in cases]
    out = [torch.full((200, 1, d), torch.nan, device=device).to(FP8) for d in (24, 16)]
    expected = [x.clone() for x in out]
    for i, case in enumerate(cases):
        for pool, x, descale in (
            (expected[0], case.k, k_descale[i]),
            (expected[1], case.v, v_descale[i]),
        ):
            for s, first in enumerate(starts[i, :-1].tolist()):
                rows = kept_rows(case, x, s)
                pool[first : first + len(rows), 0] = codes_of(rows, descale[s])
    arguments = dict(
        k=[x.k for x in cases],
        v=[x.v for x in cases],
        cu_seqlens_k=cases[0].cu_seqlens_k,
        indices=torch.cat(kept),
        cu_kept=cumulative(counts * num_layers, device),
        cu_seqlens_out=starts,
        max_kept=30,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    for function in (compact_layers, reference.compact_layers):
        pool_k, pool_v = (x.clone() for x in out)
        function(**arguments, out_k=pool_k, out_v=pool_v)
        assert_identical([pool_k, pool_v], expected)


def test_codes_move_as_they_are(device: torch.device) -> None:
    """From a pool that is fp8 into another: any codes, NaN included, without scales."""
    case = random_case([300], [120, 200], d=80, device=device)
    generator = torch.Generator().manual_seed(0)
    for name in ("k", "v"):
        noise = torch.randint(0, 256, case.k.shape, dtype=torch.uint8, generator=generator)
        setattr(case, name, noise.to(device).view(FP8))
    expected, starts, _ = fp8_pools(case)
    for x, pool in zip((case.k, case.v), expected, strict=True):
        for s, n in enumerate(case.counts):
            pool[starts[s] : starts[s] + n, 0] = kept_rows(case, x, s)
    for function in (compact_kv, reference.compact_kv):
        out, _, _ = fp8_pools(case)
        options = dict(cu_seqlens_out=starts, **case.selection)
        function(case.k, case.v, out_k=out[0], out_v=out[1], **options)
        assert_identical(out, expected)


@pytest.mark.parametrize("page_size", [None, 7])
def test_means_are_quantised(device: torch.device, page_size: int | None) -> None:
    """Whole sums and powers of two, so that means are exact however they are made."""
    case = random_case([9] * 3, [4, 0, 2, 9, 1, 5], d=80, d_v=48, device=device)
    out, starts, table = fp8_pools(case, page_size)
    counts = torch.tensor([4, 0, 1, 2**20, 0, 8], dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(0)
    sums = [torch.randint(-900, 900, (6, 4, d), generator=generator).float() for d in (80, 48)]
    sums = [x.to(device) for x in sums]
    descales = [torch.rand(6, 1, generator=generator).to(device) for _ in range(2)]
    expected = [x.clone() for x in out]
    for x, total, descale in zip(expected, sums, descales, strict=True):
        for segment, count in enumerate(counts.tolist()):
            if count:
                (row,) = rows_of(starts, table, page_size or 1, segment, 1)
                mean = total[segment].sum(0) / count
                x.view(-1, x.shape[-1])[row] = codes_of(mean, descale[segment])
    options = dict(out_block_table=table, k_descale=descales[0], v_descale=descales[1])
    stock, views = [x.clone() for x in out], [framed(written(x)) for x in out]
    reference.store_means(*sums, counts, *stock, starts, **options)
    pool_k, pool_v = (view.view(FP8) for view, _ in views)
    store_means(*sums, counts, pool_k, pool_v, starts, **options)
    assert_identical(stock, expected)
    assert_identical([pool_k.contiguous(), pool_v.contiguous()], expected)
    for _, frame in views:
        assert_frame_is_intact(frame)


@dataclass
class Fp8Cache:
    """A batch whose K and V are codes, and the scales of its segments `[num_seqs, num_kv_heads]`.

    plain: the same batch dequantised, in fp32 and packed; NaN where nothing lives.
    """

    batch: Varlen
    k_descale: Tensor
    v_descale: Tensor
    plain: Varlen

    @property
    def descales(self) -> dict[str, Tensor]:
        return dict(k_descale=self.k_descale, v_descale=self.v_descale)


def fp8_cache(
    lengths_q: list[int], lengths_k: list[int], *, page_size: int | None = None, **shapes: Any
) -> Fp8Cache:
    """random_varlen's batch, each segment by a scale of its own: as it should be, or another."""
    batch = random_varlen(lengths_q, lengths_k, **shapes)
    device, num_kv_heads = batch.k.device, batch.k.shape[-2]
    generator = torch.Generator().manual_seed(3)
    seqs = torch.arange(len(lengths_k)).repeat_interleave(torch.tensor(lengths_k).long())
    scales, codes, plain = [], [], []
    for x in (batch.k, batch.v):
        scale = torch.rand(len(lengths_k), num_kv_heads, generator=generator).to(device) * 0.03
        scale += 0.005  # of normal numbers, some saturate at the least of it
        of_rows = scale[seqs.to(device)][..., None]
        scales.append(scale)
        codes.append(codes_of(x, of_rows))
        plain.append(codes[-1].float() * of_rows)
    whole = replace(batch, k=plain[0], v=plain[1])
    batch = replace(batch, k=codes[0], v=codes[1])
    if page_size is not None:
        table = random_block_table(lengths_k, page_size, device)
        k, v = (to_pages(x, batch.cu_seqlens_k, table, page_size) for x in codes)
        batch = replace(batch, k=k, v=v, block_table=table)
    return Fp8Cache(batch, *scales, whole)


APPENDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one row": (1, dict(capacities=[9, 5], used=[3, 0])),
    "rows of many heads": (
        5,
        dict(capacities=[40, 9], used=[30, 1], num_heads=8, num_kv_heads=8, d=128, dtype=BFLOAT),
    ),
    "16 rows of 3 heads": (
        16,
        dict(capacities=[30, 16], used=[13, 0], num_heads=3, num_kv_heads=3, d=80, d_v=48),
    ),
    "not all rows have room": (3, dict(capacities=[5, 5, 5], used=[3, 5, 1], dtype=FLOAT)),
    "pages of 16": (5, dict(capacities=[63, 17, 40], used=[30, 11, 0], page_size=16, d=96)),
    "head size 256": (1, dict(capacities=[9, 9], used=[3, 8], d=256, d_v=64, dtype=BFLOAT)),
}


@pytest.mark.parametrize(("n", "shapes"), APPENDS.values(), ids=APPENDS.keys())
def test_appends_are_quantised(device: torch.device, n: int, shapes: dict[str, Any]) -> None:
    """By the segment's scale, whatever comes: what is too large saturates."""
    shapes = dict(shapes)
    capacities, used = shapes.pop("capacities"), shapes.pop("used")
    cache = fp8_cache([0] * len(used), capacities, used=used, **shapes, device=device)
    batch = cache.batch
    generator = torch.Generator().manual_seed(7)
    dtype = batch.q.dtype
    new = [
        (torch.randn(len(used), n, *x.shape[-2:], generator=generator) * 4).to(device, dtype)
        for x in (batch.k, batch.v)
    ]
    new[0][0, 0, 0, 0], new[1][-1, -1, -1, -1] = 6e4, -6e4
    expected = [batch.k.clone(), batch.v.clone()]
    for x, pool, scale in zip(new, expected, cache.descales.values(), strict=True):
        page_size = pool.shape[1] if pool.dim() == 4 else 1
        for i, count in enumerate(used):
            fits = min(n, capacities[i] - count)
            rows = rows_of(batch.cu_seqlens_k, batch.block_table, page_size, i, count + fits)
            codes = codes_of(x[i, :fits], scale[i][None, :, None])
            assert not codes.isnan().any()
            pool.view(-1, *pool.shape[-2:])[rows[count:]] = codes
    for function in (append_kv, reference.append_kv):
        views = [framed(written(x)) for x in (batch.k, batch.v)]
        k, v = (view.view(FP8) for view, _ in views)
        if function is reference.append_kv:
            k, v = k.contiguous(), v.contiguous()
        lengths = batch.seqused_k.clone()
        where = dict(block_table=batch.block_table, **cache.descales)
        function(*new, k, v, batch.cu_seqlens_k, lengths, **where)
        assert lengths.tolist() == [x + n for x in used]
        assert_identical([k.contiguous(), v.contiguous()], expected)
        for _, frame in views:
            assert_frame_is_intact(frame)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=16, max_size=16),
    st.floats(2.0**-100, 2.0**100, width=32),
)
@pytest.mark.filterwarnings("ignore:overflow encountered in divide:RuntimeWarning")
def test_any_row_is_nearest_or_saturates(numbers: list[float], descale: float) -> None:
    """A code is within half a step of the row: 1/16 of it, or 2**-10 scales; and never NaN."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = torch.tensor(numbers, device=device).view(1, 1, 1, 16)
    cache = torch.zeros(1, 1, 16, dtype=FP8, device=device)
    scale = torch.tensor([[descale]], device=device)
    lengths = cumulative([1], device), torch.zeros(1, dtype=torch.int32, device=device)
    other = cache.clone()
    append_kv(row, row, cache, other, *lengths, k_descale=scale, v_descale=scale)
    assert_identical([cache, other], [codes_of(row[0], scale)] * 2)
    stored, given_ = cache.double().flatten(), row.double().flatten() / descale
    assert not stored.isnan().any()
    nearest = given_.clamp(-448, 448)
    assert ((stored - nearest).abs() <= (nearest.abs() / 16).clamp(min=2.0**-10) * 1.0001).all()


# Refusals.


BAD_APPEND: dict[str, dict[str, Any]] = {
    "k_descale: got None": dict(k_descale=None),
    "v_descale: got shape": dict(v_descale=torch.ones(1, 3)),
    "k: got dtype": dict(k=torch.zeros(1, 3, 2, 64).to(FP8)),
    "v_descale: got a tensor": dict(v_cache=torch.zeros(9, 2, 64).half()),
}


@pytest.mark.parametrize(("name", "change"), BAD_APPEND.items())
def test_append_refuses_by_name(device, monkeypatch, name: str, change: dict[str, Any]) -> None:
    monkeypatch.setattr(append, "_append_kernel", None)
    usual = dict(
        k=torch.zeros(1, 3, 2, 64).half(),
        v=torch.zeros(1, 3, 2, 64).half(),
        k_cache=torch.zeros(9, 2, 64).to(FP8),
        v_cache=torch.zeros(9, 2, 64).to(FP8),
        cu_seqlens_k=cumulative([9]),
        seqused_k=torch.tensor([4], dtype=torch.int32),
        k_descale=torch.ones(1, 2),
        v_descale=torch.ones(1, 2),
    )
    given_ = {key: x if x is None else x.to(device) for key, x in (usual | change).items()}
    with pytest.raises((ValueError, NotImplementedError), match=f"^{name}"):
        append_kv(**given_)


BAD_COMPACT: dict[str, dict[str, Any]] = {
    "k_descale: got None": dict(k_descale=None),
    "v_descale: got shape": dict(v_descale=torch.ones(4)),
    "k_descale: got dtype": dict(k_descale=torch.ones(4, 1).double()),
    "v_descale: got a tensor": dict(out_v=torch.zeros(42, 1, 64).half()),
    "out_k: got dtype": dict(out_k=torch.zeros(42, 1, 64)),
}


@pytest.mark.parametrize(("name", "change"), BAD_COMPACT.items())
def test_compaction_refuses_by_name(device, monkeypatch, name: str, change: dict[str, Any]) -> None:
    monkeypatch.setattr(compact, "_compact_kernel", None)
    case = random_case([20, 9], [9, 9, 3, 3], device=device)
    (out_k, out_v), starts, _ = fp8_pools(case)
    assert len(out_k) == 42
    usual = dict(out_k=out_k, out_v=out_v, cu_seqlens_out=starts)
    usual |= dict(k_descale=torch.ones(4, 1), v_descale=torch.ones(4, 1))
    given_ = {key: x if x is None else x.to(device) for key, x in (usual | change).items()}
    with pytest.raises(ValueError, match=f"^{name}"):
        compact_kv(case.k, case.v, **case.selection, **given_)


def test_scales_are_of_layers_that_are_there(device: torch.device) -> None:
    case = random_case([20], [9, 9], device=device)
    options = selection_of(case)
    with pytest.raises(ValueError, match=r"^k: got no layers"):
        kept_descales([], [], case.cu_seqlens_k, **options)
    with pytest.raises(ValueError, match=r"^v: got 1 layers, expected 2"):
        kept_descales([case.k] * 2, [case.v], case.cu_seqlens_k, **options)
    with pytest.raises(ValueError, match=r"^cu_kept: got shape"):
        kept_descales([case.k] * 2, [case.v] * 2, case.cu_seqlens_k, **options)
    with pytest.raises(NotImplementedError, match=r"^k: got dtype torch.float8"):
        kept_descales([case.k.to(FP8)], [case.v], case.cu_seqlens_k, **options)
    across = case.v.transpose(0, 2).contiguous().transpose(0, 2)
    with pytest.raises(ValueError, match=r"^v\[1\]: got strides"):
        kept_descales([case.k] * 2, [case.v, across], case.cu_seqlens_k, **options)


def test_what_is_no_number_sets_no_scale(device: torch.device) -> None:
    case = random_case([20], [9, 9], device=device)
    expected = [x.clone() for x in descales_of(kept_descales, case)]
    least = case.k.abs().argmin()
    case.k.view(-1)[least] = torch.nan
    for function in (kept_descales, reference.kept_descales):
        assert_identical(descales_of(function, case), expected)


def test_gpus_that_do_not_convert_it_are_named(monkeypatch) -> None:
    class OnAmpere:
        dtype, is_cuda, device = FP8, True, torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(NotImplementedError, match=r"^k: got dtype .* capability \(8, 6\), expec"):
        checks.expect_float("k", OnAmpere(), or_fp8=True)  # type: ignore[arg-type]
