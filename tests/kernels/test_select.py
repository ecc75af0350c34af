"""select_tokens against the fp32 reference: everything about it is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_identical, cumulative

from vlcache_triton.kernels import reference, select
from vlcache_triton.kernels.select import Selection, select_tokens

MANY = 2**30  # more than any length: clamped to it


def integers(values: Any, device: torch.device | str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def assert_equals_reference(
    scores: torch.Tensor, lengths: list[int], keep: torch.Tensor, recent: torch.Tensor
) -> Selection:
    """Both implementations agree to the bit on all that is defined."""
    cu_seqlens = cumulative(lengths, scores.device)
    arguments = (scores, cu_seqlens, keep, recent)
    actual = select_tokens(*arguments, max_seqlen=max(lengths))
    expected = reference.select_tokens(*arguments, max_seqlen=max(lengths))
    total = int(expected.cu_kept[-1])
    assert_identical(
        [actual.indices[:total], actual.cu_kept], [expected.indices[:total], expected.cu_kept]
    )
    return actual


@pytest.mark.parametrize("leading", [(), (2,), (2, 2)])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_layers_sequences_heads(device, leading: tuple[int, ...], num_kv_heads: int) -> None:
    lengths = [111, 0, 63, 1]
    generator = torch.Generator().manual_seed(len(leading))
    scores = torch.rand(*leading, num_kv_heads, sum(lengths), generator=generator).to(device)
    keep = torch.randint(0, 120, (*leading, 4), generator=generator).int().to(device)
    recent = torch.randint(0, 30, (*leading, 4), generator=generator).int().to(device)
    assert_equals_reference(scores, lengths, keep, recent)


@pytest.mark.parametrize("n", [1, 63, 111, 1024, 1025, 2000, 5000])
def test_lengths(device: torch.device, n: int) -> None:
    """Within one block, and over several."""
    scores = torch.rand(2, n + 3, generator=torch.Generator().manual_seed(n)).to(device)
    keep, recent = integers([n // 3 + 1, 2], device), integers([n // 30, 1], device)
    selection = assert_equals_reference(scores, [n, 3], keep, recent)
    assert selection.cu_kept.tolist()[:3] == [0, n // 3 + 1, 2 * (n // 3 + 1)]


@pytest.mark.parametrize(
    ("keep", "recent"),
    [(0, 0), (0, 5), (-3, 1), (1, 0), (1, 1), (7, 7), (7, MANY), (7, -1), (111, 0), (MANY, MANY)],
)
def test_clamping(device: torch.device, keep: int, recent: int) -> None:
    scores = torch.rand(2, 111, generator=torch.Generator().manual_seed(0)).to(device)
    assert_equals_reference(scores, [111], integers([keep], device), integers([recent], device))


def test_ties_go_to_the_lower_position(device: torch.device) -> None:
    scores = torch.zeros(1, 3000, device=device)
    scores[0, 2500] = 1.0
    scores[0, 2000:2010] = -0.0
    selection = select_tokens(
        scores,
        cumulative([3000], device),
        integers([2004], device),
        integers([2], device),
        max_seqlen=3000,
        total_kept=2004,
    )
    assert selection.indices.tolist() == [*range(2001), 2500, 2998, 2999]


def test_order_of_all_floats(device: torch.device) -> None:
    """Negative, subnormal, infinite, and floats that differ in their last bit only."""
    one = torch.ones(())
    values = [torch.inf, -torch.inf, 1e-45, -1e-45, 0.0, -0.0, 1e-38, 3e38, -3e38, -1.0]
    values += [1.0, one.nextafter(one * 2).item(), one.nextafter(one * 0).item()]
    scores = torch.tensor([values], device=device)
    for keep in range(len(values) + 1):
        assert_equals_reference(
            scores, [len(values)], integers([keep], device), integers([0], device)
        )


def test_nan_scores_end_and_stay_in_bounds(device: torch.device) -> None:
    """What a NaN ranks as is not defined; the counts and the order of the indices are."""
    scores = torch.rand(1, 200, generator=torch.Generator().manual_seed(0)).to(device)
    scores[0, ::3] = torch.nan
    selection = select_tokens(
        scores,
        cumulative([200], device),
        integers([50], device),
        integers([5], device),
        max_seqlen=200,
        total_kept=50,
    )
    assert selection.cu_kept.tolist() == [0, 50]
    assert (selection.indices.diff() > 0).all()
    assert selection.indices[0] >= 0
    assert selection.indices[-1] == 199


@pytest.mark.parametrize("total_kept", [0, 1, 50, 119, 120, 130])
def test_never_writes_behind_the_indices(device, monkeypatch, total_kept: int) -> None:
    """Guard bands round all that the host function allocates."""
    empty, bands = torch.empty, []

    def guarded(size: int, **options: Any) -> torch.Tensor:
        bands.append(torch.full((size + 128,), -7, **options))
        return bands[-1][64 : size + 64]

    monkeypatch.setattr(select.torch, "empty", guarded)
    scores = torch.rand(2, 90, generator=torch.Generator().manual_seed(0)).to(device)
    arguments = (scores, cumulative([90], device), integers([60], device), integers([6], device))
    actual = select_tokens(*arguments, max_seqlen=90, total_kept=total_kept)
    monkeypatch.setattr(select.torch, "empty", empty)
    expected = reference.select_tokens(*arguments, max_seqlen=90)
    written = min(total_kept, 120)
    assert torch.equal(actual.indices[:written], expected.indices[:written])
    assert torch.equal(actual.cu_kept, expected.cu_kept)
    assert len(bands) == 2
    for band in bands:
        assert (band[:64] == -7).all()
        assert (band[-64:] == -7).all()


def test_runs_agree(device: torch.device) -> None:
    scores = torch.rand(2, 2, 700, generator=torch.Generator().manual_seed(0)).to(device)
    arguments = (scores.round(decimals=1), cumulative([700], device))
    keep, recent = integers([[70], [300]], device), integers([[7], [30]], device)
    options = {"max_seqlen": 700, "total_kept": 740}
    first = select_tokens(*arguments, keep, recent, **options)
    assert_identical(select_tokens(*arguments, keep, recent, **options), first)


sequences = st.lists(
    st.tuples(st.integers(0, 70), st.integers(-2, 80), st.integers(-2, 80)), min_size=1, max_size=4
)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(sequences, st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
def test_many_ties(pairs, num_kv_heads: int, levels: int, seed: int) -> None:
    """Few different scores: the result is the reference's, budgets are met, windows are kept."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths, keeps, recents = map(list, zip(*pairs, strict=True))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels, (num_kv_heads, sum(lengths)), generator=generator)
    keep, recent = integers(keeps, device), integers(recents, device)
    selection = assert_equals_reference(scores.float().to(device), lengths, keep, recent)
    counts = [max(0, min(k, n)) for k, n in zip(keeps, lengths, strict=True)]
    assert selection.cu_kept[-1] == sum(counts) * num_kv_heads
    bounds = selection.cu_kept.tolist()
    for i, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        window = set(range(n - max(0, min(recents[i], count)), n))
        for s in range(i * num_kv_heads, (i + 1) * num_kv_heads):
            kept = selection.indices[bounds[s] : bounds[s + 1]].tolist()
            assert kept == sorted(set(kept))
            assert window <= set(kept) <= set(range(n))


@settings(derandomize=True, max_examples=10, deadline=None)
@given(sequences, st.integers(0, 2**31))
def test_a_batch_equals_its_sequences(pairs, seed: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths, keeps, recents = map(list, zip(*pairs, strict=True))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, sum(lengths), generator=generator).to(device)
    keep, recent = integers(keeps, device), integers(recents, device)
    together = select_tokens(
        scores, cumulative(lengths, device), keep, recent, max_seqlen=max(lengths)
    )
    for i, part in enumerate(scores.split(lengths, 1)):
        single = select_tokens(
            part.contiguous(),
            cumulative(lengths[i : i + 1], device),
            keep[i : i + 1],
            recent[i : i + 1],
            max_seqlen=lengths[i],
        )
        begin, end = together.cu_kept[2 * i], together.cu_kept[2 * i + 2]
        assert torch.equal(together.indices[begin:end], single.indices[: end - begin])
        assert torch.equal(together.cu_kept[2 * i : 2 * i + 3] - begin, single.cu_kept)


BAD = {
    "scores: got shape": dict(scores=torch.zeros(9)),
    "scores: got dtype": dict(scores=torch.zeros(2, 9).half()),
    "scores: got strides": dict(scores=torch.zeros(9, 2).T),
    "cu_seqlens": dict(cu_seqlens=torch.tensor([0, 9])),
    "keep: got shape": dict(keep=torch.zeros(2).int()),
    "keep: got dtype": dict(keep=torch.zeros(1)),
    "recent": dict(recent=torch.zeros(1, 1).int()),
    "total_kept": dict(total_kept=2**31),
}


@pytest.mark.parametrize(("name", "change"), BAD.items())
def test_refusals_name_the_argument(device, name: str, change: dict[str, Any]) -> None:
    arguments = dict(
        scores=torch.zeros(2, 9),
        cu_seqlens=cumulative([9]),
        keep=torch.ones(1).int(),
        recent=torch.ones(1).int(),
        max_seqlen=9,
    )
    arguments = {
        k: v.to(device) if torch.is_tensor(v) else v for k, v in (arguments | change).items()
    }
    with pytest.raises(ValueError, match=name):
        select_tokens(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [8192, 131072])
def test_large(device: torch.device, n: int) -> None:
    scores = torch.rand(32, 8, n, device=device, generator=torch.Generator(device).manual_seed(0))
    keep = torch.linspace(n // 100, n // 2, 32, device=device).int()[:, None]
    assert_equals_reference(scores, [n], keep, keep // 10)


@pytest.mark.gpu
def test_the_host_never_waits(device: torch.device) -> None:
    scores = torch.rand(2, 700, device=device)
    arguments = (scores, cumulative([700], device), integers([70], device), integers([7], device))
    select_tokens(*arguments, max_seqlen=700)
    torch.cuda.set_sync_debug_mode("error")
    try:
        selection = select_tokens(*arguments, max_seqlen=700)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert selection.cu_kept.tolist() == [0, 70, 140]


@pytest.mark.gpu
def test_past_2_to_the_31_elements(device: torch.device) -> None:
    n, layers = 2**20, 2049
    scores = torch.zeros(layers, 1, n, device=device)
    scores[-1, 0, 12345] = 1.0
    selection = select_tokens(
        scores,
        cumulative([n], device),
        torch.ones(layers, 1, dtype=torch.int32, device=device),
        torch.zeros(layers, 1, dtype=torch.int32, device=device),
        max_seqlen=n,
        total_kept=layers,
    )
    assert selection.indices.tolist() == [0] * (layers - 1) + [12345]


@pytest.mark.gpu
def test_lengths_compile_nothing_new(device: torch.device) -> None:
    def compiled() -> int:
        return len(select._select_kernel.device_caches[device.index or 0][0])

    def one(n: int) -> None:
        scores = torch.rand(2, n, device=device)
        keep, recent = integers([n // 2], device), integers([n // 20], device)
        assert_equals_reference(scores, [n], keep, recent)

    one(1000)
    one(2000)
    before = compiled()
    for n in (1, 16, 63, 111, 1024, 4096, 10000, 100000):
        one(n)
    assert compiled() == before
