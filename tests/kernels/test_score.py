"""post_vision_stats against the fp32 reference, and what must hold whatever the reference says."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Varlen, assert_accurate, assert_identical, cumulative, random_varlen

from vlcache_triton.kernels import reference, score
from vlcache_triton.kernels.score import PostVisionStats, post_vision_stats

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def run(function: Any, batch: Varlen, **options: Any) -> PostVisionStats:
    """Either implementation on a batch, or on one with some of its fields replaced."""
    return function(
        batch.q,
        batch.k,
        batch.cu_seqlens_q,
        batch.cu_seqlens_k,
        batch.max_seqlen_q,
        batch.max_seqlen_k,
        **(batch.cache | options),
    )


def plain_scores(
    packed: Varlen,
    lengths_q: list[int],
    live: list[int],
    *,
    softcap: float = 0.0,
    row_weights: torch.Tensor | None = None,
    row_reduction: str = "sum",
    group_reduction: str = "mean",
) -> torch.Tensor:
    """The scores by plain torch in the dtype of the inputs."""
    num_heads, d = packed.q.shape[1:]
    total_k, num_kv_heads, _ = packed.k.shape
    group = num_heads // num_kv_heads
    scores = torch.zeros(num_kv_heads, total_k, device=packed.k.device)
    starts_q, starts_k = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_k.tolist()
    for i, (n_q, n_k) in enumerate(zip(lengths_q, live, strict=True)):
        if n_q == 0:
            continue
        q = packed.q[starts_q[i] : starts_q[i] + n_q].transpose(0, 1)
        k = packed.k[starts_k[i] : starts_k[i] + n_k]
        k = k.repeat_interleave(group, 1).permute(1, 2, 0)
        rows = torch.arange(n_q, device=q.device)[:, None] + n_k - n_q
        hidden = torch.arange(n_k, device=q.device) > rows
        logits = q @ k * d**-0.5
        if softcap > 0:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits.masked_fill(hidden, -torch.inf)
        attention = logits.softmax(-1).masked_fill(hidden, 0.0)
        if row_weights is not None:
            weights = row_weights[starts_q[i] : starts_q[i] + n_q, None]
            attention = attention * weights.to(attention.dtype)
        column = attention.sum(1) if row_reduction == "sum" else attention.amax(1)
        column = column.view(num_kv_heads, group, n_k)
        column = column.mean(1) if group_reduction == "mean" else column.amax(1)
        scores[:, starts_k[i] : starts_k[i] + n_k] = column.float()
    return scores


def assert_counts(actual: torch.Tensor, batch: Varlen, threshold=0.01, **options: Any) -> None:
    """Only entries within rounding of the threshold may count otherwise than in the reference."""
    stats = functools.partial(run, reference.post_vision_stats, batch, **options)
    strict = stats(threshold=threshold * 1.0001).retained
    loose = stats(threshold=threshold / 1.0001).retained
    assert (strict <= actual).all()
    assert (actual <= loose).all()


CASES = {
    "one row, one key": dict(lengths_q=[1], lengths_k=[1]),
    "odd lengths": dict(lengths_q=[1, 63, 5], lengths_k=[63, 111, 1000], seed=1),
    "more than one row block": dict(lengths_q=[111], lengths_k=[333], num_heads=4, num_kv_heads=1),
    "long": dict(lengths_q=[50], lengths_k=[2000], num_heads=8, num_kv_heads=2, dtype=BFLOAT),
    "rows only": dict(lengths_q=[150, 3], lengths_k=[150, 3], dtype=FLOAT),
    "more rows than keys": dict(lengths_q=[9, 70], lengths_k=[4, 5], num_heads=2, num_kv_heads=2),
    "empty sequences": dict(lengths_q=[0, 3, 4, 0, 0], lengths_k=[7, 0, 40, 0, 90], dtype=FLOAT),
    "no rows at all": dict(lengths_q=[0, 0], lengths_k=[7, 9]),
    "no keys at all": dict(lengths_q=[2, 3], lengths_k=[0, 0]),
    "live keys": dict(lengths_q=[5, 1, 8], lengths_k=[111, 63, 200], used=[70, 0, 200]),
    "pages of 1": dict(lengths_q=[5, 2], lengths_k=[63, 111], page_size=1, dtype=BFLOAT),
    "pages of 16": dict(lengths_q=[5, 0, 2], lengths_k=[63, 30, 211], page_size=16),
    "pages of 7, live": dict(lengths_q=[5, 2], lengths_k=[63, 111], page_size=7, used=[9, 111]),
    "group 1": dict(lengths_q=[20], lengths_k=[200], num_heads=3, num_kv_heads=3, d=80),
    "group 7": dict(lengths_q=[50], lengths_k=[111], num_heads=14, d=128, dtype=BFLOAT),
    "group 8": dict(lengths_q=[9], lengths_k=[130], num_heads=16, d=96),
    "group 3, fp32": dict(lengths_q=[33], lengths_k=[63], num_heads=6, d=128, dtype=FLOAT),
    "head size 256": dict(lengths_q=[20], lengths_k=[111], d=256, dtype=BFLOAT),
    "head size 8": dict(lengths_q=[12], lengths_k=[40], d=8, dtype=FLOAT),
    "head size 1": dict(lengths_q=[12], lengths_k=[40], d=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_reference(device: torch.device, case: dict[str, Any]) -> None:
    batch = random_varlen(**case, device=device)
    packed = random_varlen(**{**case, "page_size": None}, device=device)
    actual = run(post_vision_stats, batch)
    expected = run(reference.post_vision_stats, batch)
    plain = torch.zeros_like(expected.scores)
    plain[:, : packed.k.shape[0]] = plain_scores(
        packed, case["lengths_q"], case.get("used", case["lengths_k"])
    )
    assert_accurate(actual.scores, plain, expected.scores)
    assert torch.equal(actual.visible, expected.visible)
    assert_counts(actual.retained, batch)


REDUCED = (
    "more than one row block",
    "more rows than keys",
    "empty sequences",
    "pages of 7, live",
    "group 7",
    "group 3, fp32",
)


@pytest.mark.parametrize(
    ("row_reduction", "group_reduction", "weighted"),
    [("max", "max", False), ("max", "mean", True), ("sum", "max", True), ("sum", "mean", True)],
)
@pytest.mark.parametrize("name", REDUCED)
def test_reductions_and_weights(
    device, name: str, row_reduction: str, group_reduction: str, weighted: bool
) -> None:
    """The counts of sparsity know nothing of them."""
    case = CASES[name]
    batch = random_varlen(**case, device=device)
    packed = random_varlen(**{**case, "page_size": None}, device=device)
    options: dict[str, Any] = dict(row_reduction=row_reduction, group_reduction=group_reduction)
    if weighted:
        weights = torch.rand(len(batch.q), generator=torch.Generator().manual_seed(2))
        options["row_weights"] = (weights * 3).round().to(device)  # some are 0
    actual = run(post_vision_stats, batch, **options)
    expected = run(reference.post_vision_stats, batch, **options)
    plain = torch.zeros_like(expected.scores)
    plain[:, : packed.k.shape[0]] = plain_scores(
        packed, case["lengths_q"], case.get("used", case["lengths_k"]), **options
    )
    assert_accurate(actual.scores, plain, expected.scores)
    assert_identical(actual[1:], run(post_vision_stats, batch)[1:])


def test_weights_of_1_change_nothing(device: torch.device) -> None:
    batch = random_varlen([9, 4], [90, 63], device=device)
    ones = torch.ones(13, device=device)
    assert_identical(run(post_vision_stats, batch, row_weights=ones), run(post_vision_stats, batch))


def test_rows_of_weight_0_are_not_there(device: torch.device) -> None:
    """The sparsity counts them all the same."""
    batch = random_varlen([9], [90], dtype=FLOAT, device=device)
    weights = torch.tensor([0.0] * 5 + [1.0] * 4, device=device)
    last = random_varlen([4], [90], dtype=FLOAT, device=device)
    last.q, last.k = batch.q[5:].clone(), batch.k
    for reduction in ("sum", "max"):
        scores = run(post_vision_stats, batch, row_weights=weights, row_reduction=reduction).scores
        expected = run(post_vision_stats, last, row_reduction=reduction).scores
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("softcap", [0.5, 2.0, 50.0])
@pytest.mark.parametrize(
    "name", ["odd lengths", "more rows than keys", "pages of 7, live", "group 3, fp32"]
)
def test_softcap(device: torch.device, name: str, softcap: float) -> None:
    """Logits that are large for the small caps, and of which the large one changes little."""
    case = CASES[name]
    batch = random_varlen(**case, device=device)
    packed = random_varlen(**{**case, "page_size": None}, device=device)
    for x in (batch, packed):
        x.q = x.q * 3
    actual = run(post_vision_stats, batch, softcap=softcap)
    expected = run(reference.post_vision_stats, batch, softcap=softcap)
    plain = torch.zeros_like(expected.scores)
    live = case.get("used", case["lengths_k"])
    capped = plain_scores(packed, case["lengths_q"], live, softcap=softcap)
    plain[:, : packed.k.shape[0]] = capped
    assert_accurate(actual.scores, plain, expected.scores)
    assert torch.equal(actual.visible, expected.visible)
    assert_counts(actual.retained, batch, softcap=softcap)
    uncapped = run(reference.post_vision_stats, batch)
    assert not torch.allclose(expected.scores, uncapped.scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("threshold", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_counts_are_exact(device: torch.device, dtype: torch.dtype, threshold: float) -> None:
    """Small integers make exact logits, so even ties with the maximum count the same."""
    batch = random_varlen([7, 50], [211, 63], num_heads=6, dtype=dtype, device=device)
    batch.q, batch.k = batch.q.round().clamp(-1, 1), batch.k.round().clamp(-1, 1)
    options = {"softmax_scale": 0.5, "threshold": threshold}
    actual = run(post_vision_stats, batch, **options)
    expected = run(reference.post_vision_stats, batch, **options)
    assert torch.equal(actual.retained, expected.retained)
    assert torch.equal(actual.visible, expected.visible)


def test_every_probability_is_given_once(device: torch.device) -> None:
    batch = random_varlen([40, 7], [300, 7], num_heads=8, num_kv_heads=2, device=device)
    scores = run(post_vision_stats, batch).scores
    totals = torch.stack([part.sum(1) for part in scores.split([300, 7], 1)])
    expected = torch.tensor([[40.0], [7.0]], device=device).expand(2, 2)
    torch.testing.assert_close(totals, expected, rtol=1e-5, atol=0)


def test_pages_change_nothing(device: torch.device) -> None:
    shapes = dict(lengths_q=[5, 9], lengths_k=[111, 63], device=device)
    expected = run(post_vision_stats, random_varlen(**shapes))
    for page_size in (1, 16, 100):
        paged = run(post_vision_stats, random_varlen(**shapes, page_size=page_size))
        assert paged.scores.shape == (2, 2 * 111)
        assert not paged.scores[:, 174:].any()
        assert_identical([paged.scores[:, :174], *paged[1:]], expected)


def test_left_pads_are_sequences_without_rows(device: torch.device) -> None:
    batch = random_varlen([6, 4], [90, 40], dtype=FLOAT, device=device)
    expected = run(post_vision_stats, batch)
    pads = torch.full_like(batch.k[:50], torch.nan)
    batch.k = torch.cat([batch.k[:90], pads, batch.k[90:]])
    batch.cu_seqlens_q = cumulative([6, 0, 4], device)
    batch.cu_seqlens_k = cumulative([90, 50, 40], device)
    padded = run(post_vision_stats, batch)
    assert not padded.scores[:, 90:140].any()
    live = torch.cat([padded.scores[:, :90], padded.scores[:, 140:]], 1)
    torch.testing.assert_close(live, expected.scores, rtol=1e-5, atol=1e-7)
    assert torch.equal(padded.retained[[0, 2]], expected.retained)
    assert padded.visible[1] == 0
    assert not padded.retained[1].any()


def test_rows_behind_the_last_sequence_score_nothing(device: torch.device) -> None:
    batch = random_varlen([5], [80], device=device)
    expected = run(post_vision_stats, batch)
    batch.k = torch.cat([batch.k, torch.full_like(batch.k, torch.nan)])
    actual = run(post_vision_stats, batch)
    assert not actual.scores[:, 80:].any()
    assert torch.equal(actual.scores[:, :80], expected.scores)


def test_strides_change_nothing(device: torch.device) -> None:
    """Keys as Transformers caches have them, queries as a slice of a fused projection."""
    batch = random_varlen([5, 9], [111, 63], num_heads=4, d=80, device=device)
    expected = run(post_vision_stats, batch)
    batch.k = batch.k.transpose(0, 1).contiguous().transpose(0, 1)
    batch.q = torch.cat([batch.q, batch.q], 1)[:, :4]
    assert not batch.k.is_contiguous()
    assert not batch.q.is_contiguous()
    assert_identical(run(post_vision_stats, batch), expected)


def test_many_splits(device: torch.device, monkeypatch) -> None:
    """As many splits as a large GPU gives one prompt, some of them of keys that no row sees."""
    batch = random_varlen([7, 3], [2000, 63], d=16, device=device)
    monkeypatch.setattr(score, "num_multiprocessors", lambda _: 1000)
    actual = run(post_vision_stats, batch)
    expected = run(reference.post_vision_stats, batch)
    assert_accurate(actual.scores, expected.scores, expected.scores)
    assert_counts(actual.retained, batch)


def test_runs_agree_bit_for_bit(device: torch.device) -> None:
    batch = random_varlen([50, 3], [700, 111], num_heads=8, d=128, device=device)
    first = run(post_vision_stats, batch)
    assert_identical(run(post_vision_stats, batch), first)


@pytest.mark.parametrize("size", [10.0, 100.0])
def test_extreme_logits(device: torch.device, size: float) -> None:
    """One key takes all of the attention, the others underflow: no overflow, no NaN."""
    batch = random_varlen([3], [100], num_heads=2, num_kv_heads=2, dtype=FLOAT, device=device)
    batch.q[:] = size
    batch.k[:] = -size
    batch.k[42] = size
    actual = run(post_vision_stats, batch)
    expected = torch.zeros(2, 100, device=device)
    expected[:, 42] = 3.0
    logit = size**2 * 8
    torch.testing.assert_close(actual.scores, expected, rtol=2e-7 * logit, atol=0)
    assert (actual.retained == 3).all()


lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 80)), min_size=1, max_size=3)


@settings(derandomize=True, max_examples=8, deadline=None)
@given(lengths, st.randoms(use_true_random=False))
def test_sequences_do_not_touch_each_other(pairs, random) -> None:
    """A batch gives what its sequences give alone, in any order of the batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths_q, lengths_k = map(list, zip(*pairs, strict=True))
    batch = random_varlen(lengths_q, lengths_k, device=device)
    together = run(post_vision_stats, batch)
    queries, keys = batch.q.split(lengths_q), batch.k.split(lengths_k)
    parts = together.scores.split(lengths_k, 1)
    order = list(range(len(pairs)))
    random.shuffle(order)
    shuffled = post_vision_stats(
        torch.cat([queries[i] for i in order]),
        torch.cat([keys[i] for i in order]),
        cumulative([lengths_q[i] for i in order], device),
        cumulative([lengths_k[i] for i in order], device),
        batch.max_seqlen_q,
        batch.max_seqlen_k,
    )
    assert_identical(
        shuffled,
        [
            torch.cat([parts[i] for i in order], 1),
            together.retained[order],
            together.visible[order],
        ],
    )
    for i, (n_q, n_k) in enumerate(pairs):
        single = post_vision_stats(
            queries[i], keys[i], cumulative([n_q], device), cumulative([n_k], device), n_q, n_k
        )
        torch.testing.assert_close(single.scores, parts[i], rtol=1e-5, atol=1e-7)
        assert torch.equal(single.retained[0], together.retained[i])
        assert single.visible[0] == together.visible[i]


BAD = {
    "q:": (ValueError, dict(q=torch.zeros(2, 64))),
    "q: got dtype": (NotImplementedError, dict(q=torch.zeros(2, 4, 64).to(torch.float8_e4m3fn))),
    "q: got head size": (NotImplementedError, dict(q=torch.zeros(2, 4, 257).half())),
    "q: got stride": (ValueError, dict(q=torch.zeros(2, 4, 128).half()[..., ::2])),
    "k: got shape": (ValueError, dict(k=torch.zeros(1, 9, 2, 64).half())),
    "k: got dtype": (ValueError, dict(k=torch.zeros(9, 2, 64))),
    "k: got head size": (ValueError, dict(k=torch.zeros(9, 2, 32).half())),
    "k: got 3 heads": (ValueError, dict(k=torch.zeros(9, 3, 64).half())),
    "cu_seqlens_q": (ValueError, dict(cu_seqlens_q=torch.tensor([0, 2]))),
    "cu_seqlens_k": (ValueError, dict(cu_seqlens_k=cumulative([4, 5]))),
    "cu_seqlens_k: got None, expected starts$": (ValueError, dict(cu_seqlens_k=None)),
    "sinks: got shape .1, 5": (ValueError, dict(sinks=torch.zeros(1, 5))),
    "sinks: got dtype": (NotImplementedError, dict(sinks=torch.zeros(4).double())),
    "seqused_k": (ValueError, dict(seqused_k=torch.tensor([1, 2]).int())),
    "block_table": (ValueError, dict(block_table=torch.zeros(2, 9).int(), paged=True)),
    "softmax_scale": (ValueError, dict(softmax_scale=0.0)),
    "threshold": (ValueError, dict(threshold=0.0)),
    "row_reduction": (ValueError, dict(row_reduction="mean")),
    "group_reduction": (ValueError, dict(group_reduction="sum")),
    "row_weights: got dtype": (ValueError, dict(row_weights=torch.ones(2).double())),
    "row_weights: got shape": (ValueError, dict(row_weights=torch.ones(9))),
}


@pytest.mark.parametrize(("name", "error", "change"), [(k, *v) for k, v in BAD.items()])
def test_refusals_name_the_argument(device, name: str, error, change: dict[str, Any]) -> None:
    batch = random_varlen([2], [9], device=device)
    arguments = dict(
        q=batch.q,
        k=batch.k,
        cu_seqlens_q=batch.cu_seqlens_q,
        cu_seqlens_k=batch.cu_seqlens_k,
        max_seqlen_q=2,
        max_seqlen_k=9,
    )
    if change.pop("paged", False):
        arguments["k"] = batch.k[:, None]
    moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in change.items()}
    with pytest.raises(error, match=name):
        post_vision_stats(**(arguments | moved))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize(("tau", "n"), [(1, 131072), (50, 32768), (50, 2000), (2000, 8000)])
def test_large(device: torch.device, dtype: torch.dtype, tau: int, n: int) -> None:
    shapes = dict(lengths_q=[tau], lengths_k=[n], num_heads=16, num_kv_heads=4, d=128)
    batch = random_varlen(**shapes, dtype=dtype, device=device)
    actual = run(post_vision_stats, batch)
    expected = run(reference.post_vision_stats, batch)
    assert_accurate(actual.scores, plain_scores(batch, [tau], [n]), expected.scores, floor=1e-4)
    assert_counts(actual.retained, batch)
    assert_identical(run(post_vision_stats, batch), actual)


@pytest.mark.gpu
def test_the_host_never_waits(device: torch.device) -> None:
    batch = random_varlen([50, 3], [700, 111], device=device)
    run(post_vision_stats, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = run(post_vision_stats, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats.visible.tolist() == [50 * 650 + 50 * 51 // 2, 3 * 108 + 6]


@pytest.mark.gpu
@pytest.mark.parametrize("paged", [False, True])
def test_past_2_to_the_31_elements(device: torch.device, paged: bool) -> None:
    """The live sequence lies behind 2^31 elements of another that no query row looks at."""
    far = 2**31 // 64 + 1000
    batch = random_varlen([5], [333], num_heads=2, num_kv_heads=1, device=device)
    expected = run(reference.post_vision_stats, batch)
    k = torch.full((far + 333, 1, 64), torch.nan, dtype=HALF, device=device)
    k[far:] = batch.k
    batch.k = k
    if paged:
        batch.k = k[:, None]
        batch.block_table = torch.arange(far, far + 333, dtype=torch.int32, device=device)[None]
    else:
        batch.cu_seqlens_q = cumulative([0, 5], device)
        batch.cu_seqlens_k = torch.tensor([0, far, far + 333], dtype=torch.int32, device=device)
        batch.max_seqlen_k = far
    actual = run(post_vision_stats, batch)
    assert_accurate(actual.scores[:, -333:], expected.scores, expected.scores, floor=1e-3)
    assert torch.equal(actual.visible[-1:], expected.visible)


@pytest.mark.gpu
def test_lengths_compile_nothing_new(device: torch.device) -> None:
    """Only the head size, the group, the dtype and a choice of two row blocks may compile anew."""

    def compiled() -> int:
        kernels = (score._row_kernel, score._row_stats_kernel, score._column_kernel)
        return sum(len(kernel.device_caches[device.index or 0][0]) for kernel in kernels)

    run(post_vision_stats, random_varlen([17], [64], device=device))
    run(post_vision_stats, random_varlen([50], [64], device=device))
    before = compiled()
    for tau, n in [(1, 1), (16, 63), (31, 111), (50, 2000), (64, 2048), (333, 10000)]:
        run(post_vision_stats, random_varlen([tau, 1], [n, 1], device=device))
    assert compiled() == before
