"""Attention sinks in decoding and in the statistics: a logit a head that no key stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import (
    MEANT_INFINITIES,
    Varlen,
    assert_accurate,
    assert_decode_accurate,
    assert_identical,
    random_varlen,
    run_decode,
    sequences,
    visible_keys,
)

from vlcache_triton.kernels import decode, reference, schedule
from vlcache_triton.kernels.decode import decode_workspace, varlen_decode
from vlcache_triton.kernels.schedule import decode_schedule
from vlcache_triton.kernels.score import post_vision_stats

pytestmark = MEANT_INFINITIES

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def sinks_for(q: torch.Tensor, rows: int = 1, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    """Some that take nearly all of a row, and some that take nothing; one of -inf, none of +inf."""
    values = torch.tensor([1.5, -torch.inf, 9.0, 0.0, -3.0, 4.5, -0.5])
    sinks = values.repeat(rows * q.shape[1] // len(values) + 1)[: rows * q.shape[1]]
    shape = (q.shape[1],) if rows == 1 else (rows, q.shape[1])
    return sinks.view(shape).to(q.device, dtype)


CASES: dict[str, dict[str, Any]] = {
    "one row, one key": dict(lengths_q=[1], lengths_k=[1]),
    "odd lengths": dict(lengths_q=[1, 1], lengths_k=[1, 111], num_heads=3, num_kv_heads=3, d=80),
    "2000 keys": dict(lengths_q=[1], lengths_k=[2000], num_heads=2, num_kv_heads=1, dtype=BFLOAT),
    "16 rows of 7 heads": dict(
        lengths_q=[16, 3], lengths_k=[30, 9], num_heads=7, num_kv_heads=1, d=80, dtype=BFLOAT
    ),
    "rows that see no key": dict(lengths_q=[9, 3, 2], lengths_k=[4, 0, 40], dtype=FLOAT),
    "no sequences": dict(lengths_q=[], lengths_k=[]),
    "pages, live": dict(
        lengths_q=[5, 0, 1], lengths_k=[40, 30, 90], used=[1, 30, 83], page_size=16, dtype=FLOAT
    ),
    "pages of 1": dict(lengths_q=[1, 2], lengths_k=[63, 40], page_size=1, d=96),
    "group 8": dict(lengths_q=[2], lengths_k=[70], num_heads=8, num_kv_heads=1, d=96, d_v=80),
    "head size 256": dict(
        lengths_q=[1, 3], lengths_k=[33, 9], num_heads=2, num_kv_heads=1, d=256, dtype=BFLOAT
    ),
}
DTYPES = {HALF: BFLOAT, BFLOAT: BFLOAT, FLOAT: FLOAT}  # of sinks beside queries of another


def scheduled(batch: Varlen, **options: Any) -> Any:
    used = None if batch.seqused_k is None else batch.seqused_k[None]
    lengths = (batch.cu_seqlens_k[None], batch.max_seqlen_q, batch.max_seqlen_k)
    facts = dict(seqused_k=used, block_table=batch.block_table)
    (table,) = decode_schedule(batch.q, batch.k, batch.v, *lengths, **facts)
    return run_decode(varlen_decode, batch, schedule=table, **options)


@pytest.mark.parametrize(
    ("name", "multiprocessors"), [*((x, 4) for x in CASES), ("pages, live", 40)]
)
def test_decode_equals_reference(device, monkeypatch, name: str, multiprocessors: int) -> None:
    """In splits, and by a schedule whose programs share sequences or have several."""
    for module in (decode, schedule):
        monkeypatch.setattr(module, "num_multiprocessors", lambda _: multiprocessors)
    batch = random_varlen(**CASES[name], device=device)
    options: dict[str, Any] = dict(sinks=sinks_for(batch.q, dtype=DTYPES[batch.q.dtype]))
    out = torch.full((*batch.q.shape[:2], batch.v.shape[-1]), torch.nan, dtype=batch.q.dtype)
    actual = run_decode(varlen_decode, batch, out=out.to(device), **options)
    assert_decode_accurate(actual, batch, **options)
    if schedule.IS_SUPPORTED:
        assert_decode_accurate(scheduled(batch, **options), batch, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "softcap and scale": dict(softcap=2.0, softmax_scale=0.3),
    "window": dict(window_size=(20, -1)),
    "not causal": dict(causal=False, window_size=(-1, 5)),
    "a bias of the first key": dict(first_key_bias=True),
}


@pytest.mark.parametrize(("name", "num_splits"), [*((x, 3) for x in OPTIONS), ("window", 1)])
def test_with_other_options(device, name: str, num_splits: int) -> None:
    """Sinks are neither scaled nor capped, nor do they lie in a window."""
    shapes: dict[str, Any] = dict(lengths_q=[3, 1, 2], lengths_k=[70, 40, 4], num_heads=7)
    batch = random_varlen(**shapes, num_kv_heads=1, dtype=FLOAT, device=device)
    options = OPTIONS[name] | dict(sinks=sinks_for(batch.q), num_splits=num_splits)
    if "first_key_bias" in options:
        options["first_key_bias"] = torch.tensor([2.0, 0.0, -1.0], device=device)
    assert_decode_accurate(run_decode(varlen_decode, batch, **options), batch, **options)


@pytest.mark.parametrize(
    ("function", "num_splits"),
    [(varlen_decode, 1), (varlen_decode, 3), (varlen_decode, 1000), (reference.varlen_decode, 3)],
)
def test_once_however_many_splits(device: torch.device, function, num_splits: int) -> None:
    """Without the reference: of each row the share exp(lse) / (exp(lse) + exp(sink))."""
    batch = random_varlen([1, 2], [140, 33], dtype=FLOAT, device=device)
    sinks = torch.tensor([0.5, -2.0, 3.0, 6.0], device=device)
    out, lse = run_decode(varlen_decode, batch)
    both = torch.logaddexp(lse, sinks[:, None])
    actual = run_decode(function, batch, sinks=sinks, num_splits=num_splits)
    share = (lse - both).exp().T[..., None]
    torch.testing.assert_close(actual[0], out * share, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual[1], both, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_row_that_sees_no_key_is_0(device: torch.device, num_splits: int) -> None:
    batch = random_varlen([3, 1], [1, 90], used=[1, 0], device=device)
    sinks = sinks_for(batch.q)
    for out, lse in (
        run_decode(varlen_decode, batch, sinks=sinks, num_splits=num_splits),
        run_decode(reference.varlen_decode, batch, sinks=sinks),
        scheduled(batch, sinks=sinks) if schedule.IS_SUPPORTED else (None, None),
    ):
        if out is not None:
            assert not out[[0, 1, 3]].any() and out[2].any()
            assert torch.equal(lse[:, [0, 1, 3]], sinks[:, None].expand(-1, 3))


def test_sinks_of_minus_infinity_change_nothing(device: torch.device) -> None:
    batch = random_varlen([2, 3], [63, 9], num_kv_heads=1, device=device)
    none = torch.full((4,), -torch.inf, device=device)
    expected = run_decode(varlen_decode, batch, num_splits=2)
    actual = run_decode(varlen_decode, batch, sinks=none, num_splits=2)
    torch.testing.assert_close(actual, expected)


def test_large_sinks_take_all(device: torch.device) -> None:
    """Nothing overflows, to either side."""
    batch = random_varlen([2], [63], dtype=FLOAT, device=device)
    sinks = torch.tensor([1e4, -1e4, 1e38, -1e38], device=device)
    out, lse = run_decode(varlen_decode, batch, sinks=sinks)
    plain, plain_lse = run_decode(varlen_decode, batch)
    assert not out[:, ::2].any()
    torch.testing.assert_close(out[:, 1::2], plain[:, 1::2])
    torch.testing.assert_close(lse[::2], sinks[::2, None].expand(-1, 2))
    torch.testing.assert_close(lse[1::2], plain_lse[1::2])


@pytest.mark.parametrize("rows", [2, 6])
def test_rows_of_sinks_go_round_the_sequences(device: torch.device, rows: int) -> None:
    batch = random_varlen([1] * 6, [17, 5, 0, 33, 1, 9], num_kv_heads=1, device=device)
    sinks = sinks_for(batch.q, rows)
    options = dict(sinks=sinks)
    assert_decode_accurate(run_decode(varlen_decode, batch, **options), batch, **options)
    if schedule.IS_SUPPORTED:
        assert_decode_accurate(scheduled(batch, **options), batch, **options)
    whole = sinks.view(rows, 4).repeat(6 // rows, 1)
    for function in (varlen_decode, reference.varlen_decode):
        assert_identical(
            run_decode(function, batch, sinks=whole), run_decode(function, batch, **options)
        )


def test_the_ragged_layout_has_a_row_for_each_kv_head(device: torch.device) -> None:
    """A model's `[num_heads]`, seen as `[num_kv_heads, group]`, for segments by sequence, head."""
    shapes = dict(lengths_q=[1, 1, 1], lengths_k=[63, 63, 63], num_heads=8, device=device)
    batch = random_varlen(**shapes)
    sinks = sinks_for(batch.q)
    out, lse = run_decode(varlen_decode, batch, sinks=sinks)
    k, v = (x.view(3, 63, 2, 64).transpose(1, 2).reshape(-1, 1, 64) for x in (batch.k, batch.v))
    starts = torch.arange(7, device=device).int()
    ragged = Varlen(batch.q.view(6, 4, 64), k, v, starts, starts * 63, 1, 63, None, None)
    actual, actual_lse = run_decode(varlen_decode, ragged, sinks=sinks.view(2, 4))
    assert_identical([actual.view_as(out), actual_lse.T.reshape(3, -1).T], [out, lse])


def test_two_caches_merge_by_log_sum_exps(device: torch.device) -> None:
    """With the sinks given to one of them, be it empty."""
    whole = random_varlen([2, 2], [111, 63], dtype=FLOAT, device=device)
    sinks = sinks_for(whole.q)
    expected, expected_lse = run_decode(varlen_decode, whole, sinks=sinks, causal=False)
    empty = replace(whole, seqused_k=torch.zeros(2, dtype=torch.int32, device=device))
    parts = [
        run_decode(varlen_decode, whole, causal=False),
        run_decode(varlen_decode, empty, sinks=sinks, causal=False),
    ]
    lse = torch.stack([x[1] for x in parts])
    torch.testing.assert_close(lse.logsumexp(0), expected_lse, rtol=1e-6, atol=1e-5)
    weights = (lse - expected_lse).exp().transpose(1, 2)[..., None]
    merged = (weights * torch.stack([x[0] for x in parts])).sum(0)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


def test_the_workspace_s_rubbish_is_nothing(device: torch.device) -> None:
    batch = random_varlen([1, 2], [90, 40], device=device)
    sinks = sinks_for(batch.q)
    workspace = decode_workspace(batch.q, batch.v, 2, 2, 300, num_splits=4)
    workspace.fill_(torch.nan)
    options = dict(sinks=sinks, num_splits=4)
    assert_decode_accurate(
        run_decode(varlen_decode, batch, workspace=workspace, **options), batch, **options
    )


def stats(function: Any, batch: Varlen, **options: Any) -> Any:
    lengths = (batch.cu_seqlens_q, batch.cu_seqlens_k, batch.max_seqlen_q, batch.max_seqlen_k)
    return function(batch.q, batch.k, *lengths, **(batch.cache | options))


def plain_scores(batch: Varlen, sinks: torch.Tensor, starts: list[int], like: torch.Tensor):
    """By plain torch in the dtype of the inputs."""
    scores, num_kv_heads = torch.zeros_like(like), batch.k.shape[-2]
    for (q, k, _), start in zip(sequences(batch), starts, strict=False):
        if q.shape[1] == 0 or k.shape[1] == 0:
            continue
        hidden = ~visible_keys(q.shape[1], k.shape[1], device=q.device)
        logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
        sink = sinks.to(q.dtype)[:, None, None].expand(-1, q.shape[1], 1)
        attention = torch.cat([logits, sink], -1).softmax(-1)[..., :-1].masked_fill(hidden, 0.0)
        column = attention.sum(1).view(num_kv_heads, -1, k.shape[1]).mean(1)
        scores[:, start : start + k.shape[1]] = column.float()
    return scores


STATS_CASES: dict[str, dict[str, Any]] = CASES | {
    "more than one row block": dict(lengths_q=[70], lengths_k=[150], num_kv_heads=1),
    "group 7": dict(lengths_q=[9], lengths_k=[111], num_heads=14, d=128, dtype=BFLOAT),
    "group 3": dict(lengths_q=[17, 2], lengths_k=[33, 9], num_heads=6, d=64, dtype=FLOAT),
}


@pytest.mark.parametrize("name", STATS_CASES)
def test_statistics_equal_reference(device: torch.device, name: str) -> None:
    """The counts are those without sinks, exactly."""
    batch = random_varlen(**STATS_CASES[name], device=device)
    sinks = sinks_for(batch.q, dtype=DTYPES[batch.q.dtype])
    actual = stats(post_vision_stats, batch, sinks=sinks)
    expected = stats(reference.post_vision_stats, batch, sinks=sinks)
    starts = batch.cu_seqlens_k.tolist()
    plain = plain_scores(batch, sinks, starts, expected.scores)
    assert_accurate(actual.scores, plain, expected.scores)
    assert_identical(actual[1:], stats(post_vision_stats, batch)[1:])


@pytest.mark.parametrize("row_reduction", ["sum", "max"])
@pytest.mark.parametrize("group_reduction", ["mean", "max"])
def test_statistics_otherwise_reduced(device, row_reduction: str, group_reduction: str) -> None:
    batch = random_varlen([9, 4], [90, 63], num_heads=6, dtype=FLOAT, device=device)
    options: dict[str, Any] = dict(row_reduction=row_reduction, group_reduction=group_reduction)
    options |= dict(sinks=sinks_for(batch.q), softcap=3.0)
    options["row_weights"] = torch.rand(13, generator=torch.Generator().manual_seed(0)).to(device)
    expected = stats(reference.post_vision_stats, batch, **options).scores
    actual = stats(post_vision_stats, batch, **options).scores
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_what_keys_receive_and_what_sinks_take_is_all(device: torch.device) -> None:
    """A sink of a head whose keys have the log-sum-exp l takes 1 / (1 + exp(l - sink))."""
    batch = random_varlen([40, 7], [150, 7], num_heads=8, num_kv_heads=2, device=device)
    sinks = torch.linspace(-3, 8, 8, device=device)
    scores = stats(post_vision_stats, batch, sinks=sinks).scores
    _, lse = run_decode(reference.varlen_decode, replace(batch, q=batch.q.float()))
    given = torch.sigmoid(lse - sinks[:, None]).view(2, 4, 47).mean(1)
    for part, rows in zip(scores.split([150, 7], 1), given.split([40, 7], 1), strict=True):
        torch.testing.assert_close(part.sum(1), rows.sum(1), rtol=1e-4, atol=0)
