"""varlen_decode over fp8 (e4m3) K and V: what is attended to is what the codes stand for.

Held to plain torch on the dequantised cache, which is the only place where codes meet their scale
here. The codes themselves are test_fp8.py's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kept import HEAD_ROOM, kept_rows, random_case
from support import assert_accurate, assert_identical, plain_attention, run_decode
from test_decode import CASES as DECODE_CASES
from test_fp8 import (
    BFLOAT,
    FLOAT,
    Fp8Cache,
    codes_of,
    descales_of,
    fp8_cache,
    fp8_pools,
    pytestmark,  # noqa: F401
)

from vlcache_triton.kernels import decode, reference, schedule
from vlcache_triton.kernels.append import append_kv
from vlcache_triton.kernels.compact import compact_kv
from vlcache_triton.kernels.decode import varlen_decode
from vlcache_triton.kernels.descales import kept_descales
from vlcache_triton.kernels.schedule import decode_schedule


def assert_decodes(cache: Fp8Cache, *, scheduled: bool = False, **options: Any) -> Any:
    """Within twice the error of plain torch on the dequantised cache in q's dtype."""
    batch, plain = cache.batch, cache.plain
    wide = replace(plain, q=batch.q.float())
    expected = plain_attention(wide, **options)
    same_dtype = plain_attention(
        replace(plain, k=plain.k.to(batch.q.dtype), v=plain.v.to(batch.q.dtype)), **options
    )
    out, lse = run_decode(
        reference.varlen_decode, replace(batch, q=batch.q.float()), **cache.descales, **options
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    if scheduled:
        used = None if batch.seqused_k is None else batch.seqused_k[None]
        lengths = (batch.cu_seqlens_k[None], batch.max_seqlen_q, batch.max_seqlen_k)
        where = dict(seqused_k=used, block_table=batch.block_table)
        options["schedule"] = decode_schedule(batch.q, batch.k, batch.v, *lengths, **where)[0]
    actual, actual_lse = run_decode(varlen_decode, batch, **cache.descales, **options)
    assert actual.dtype == batch.q.dtype
    assert_accurate(actual, same_dtype, expected)
    torch.testing.assert_close(actual_lse, lse, rtol=1e-5, atol=1e-4)
    return actual, actual_lse


DECODES: dict[str, dict[str, Any]] = {
    name: DECODE_CASES[name]
    for name in (
        "one row, one key",
        "odd lengths",
        "16 rows",
        "pages of 1",
        "ragged",
        "ragged pages, 3 rows",
        "group 1",
        "head size 256",
        "head sizes 40 and 256",
    )
}
DECODES |= {
    "2000 keys": dict(lengths_q=[1], lengths_k=[2000], num_heads=4, num_kv_heads=1, dtype=BFLOAT),
    "8 heads on pages": dict(
        lengths_q=[2], lengths_k=[300], num_heads=8, num_kv_heads=1, page_size=16
    ),
    "group 7, fp32": dict(
        lengths_q=[1, 3],
        lengths_k=[210, 111],
        used=[200, 63],
        num_heads=7,
        num_kv_heads=1,
        d=96,
        dtype=FLOAT,
    ),
    "empty sequences": dict(lengths_q=[0, 3, 4, 0], lengths_k=[7, 0, 40, 90], dtype=FLOAT),
}


@pytest.mark.parametrize("shapes", DECODES.values(), ids=DECODES.keys())
def test_decoding(device: torch.device, shapes: dict[str, Any]) -> None:
    assert_decodes(fp8_cache(**shapes, device=device))


@pytest.mark.skipif(not schedule.IS_SUPPORTED, reason="needs Triton 3.5")
@pytest.mark.parametrize("name", ["ragged", "ragged pages, 3 rows"])
def test_decoding_by_a_schedule(device: torch.device, name: str) -> None:
    assert_decodes(fp8_cache(**DECODES[name], device=device), scheduled=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "window": dict(window_size=(70, 2), causal=False),
    "softcap": dict(softcap=1.5),
    "scale": dict(softmax_scale=-0.3),
    "bias": dict(first_key_bias=[6.0, -2.0, 0.0, 3.5]),
    "bias and softcap": dict(first_key_bias=[6.0, -2.0, 0.0, 3.5], softcap=2.0),
}


@pytest.mark.parametrize(
    ("name", "page_size"), [*((name, None) for name in OPTIONS), ("bias and softcap", 16)]
)
def test_options(device: torch.device, name: str, page_size: int | None) -> None:
    options = OPTIONS[name]
    cache = fp8_cache(
        [9, 0, 1, 6],
        [150, 30, 140, 4],
        used=[131, 30, 140, 4],
        num_heads=7,
        num_kv_heads=1,
        d=80,
        d_v=48,
        dtype=FLOAT,
        page_size=page_size,
        device=device,
    )
    if "first_key_bias" in options:
        options = options | dict(first_key_bias=torch.tensor(options["first_key_bias"]).to(device))
    assert_decodes(cache, **options)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_sinks(device: torch.device, num_splits: int) -> None:
    """One of nearly all the weight, and one of none; they have no scale."""
    cache = fp8_cache([2, 1], [150, 63], device=device, dtype=FLOAT)
    sinks = torch.tensor([0.5, -torch.inf, 9.0, 3.0], device=device)
    expected = run_decode(reference.varlen_decode, cache.plain, sinks=sinks)
    options = dict(sinks=sinks, **cache.descales)
    for function in (varlen_decode, reference.varlen_decode):
        actual = run_decode(function, cache.batch, num_splits=num_splits, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 16])
def test_large(device: torch.device, page_size: int | None) -> None:
    shapes: dict[str, Any] = dict(num_heads=8, num_kv_heads=2, d=128, dtype=BFLOAT, device=device)
    lengths = [8192 - 37 * i for i in range(16)]
    assert_decodes(fp8_cache([1] * 16, lengths, page_size=page_size, **shapes))


def test_k_alone_or_v_alone(device: torch.device) -> None:
    cache = fp8_cache([2, 1], [70, 40], device=device, dtype=FLOAT)
    expected = run_decode(reference.varlen_decode, cache.batch, **cache.descales)
    k = replace(cache.batch, v=cache.plain.v)
    v = replace(cache.batch, k=cache.plain.k)
    for function in (varlen_decode, reference.varlen_decode):
        for batch, name in ((k, "k_descale"), (v, "v_descale")):
            actual = run_decode(function, batch, **{name: cache.descales[name]})
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_runs_agree_bit_for_bit(device: torch.device) -> None:
    cache = fp8_cache([2, 1], [150, 63], device=device)
    first = run_decode(varlen_decode, cache.batch, **cache.descales)
    assert_identical(run_decode(varlen_decode, cache.batch, **cache.descales), first)


def test_extremes(device: torch.device) -> None:
    """Zeros, the largest codes and subnormal ones, under large and small scales: no NaN."""
    cache = fp8_cache([1] * 4, [40] * 4, dtype=FLOAT, d=16, device=device)
    for x in (cache.batch.k, cache.batch.v):
        x[:40], x[40:80], x[80:120] = 0.0, 448.0, 2.0**-9
    scales = torch.tensor([1.0, 1e-30, 1e-38, 1.0], device=device)[:, None].expand(-1, 2)
    cache.k_descale, cache.v_descale = scales.contiguous(), scales.flip(0).contiguous()
    out, _ = run_decode(varlen_decode, cache.batch, **cache.descales)
    assert out.isfinite().all()
    torch.testing.assert_close(out[1], torch.full_like(out[1], 448e-38), rtol=1e-5, atol=0)
    expected = run_decode(reference.varlen_decode, cache.batch, **cache.descales)
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)


def test_a_prompt_into_fp8_and_a_step_behind_it(device: torch.device) -> None:
    """Scales, compaction, append and decode, against attention over what the codes stand for."""
    case = random_case([200, 63], [60, 200, 9, 1], d=64, dtype=BFLOAT, device=device)
    k_descale, v_descale = (x[0] for x in descales_of(kept_descales, case))
    (pool_k, pool_v), starts, _ = fp8_pools(case)
    descales = dict(k_descale=k_descale, v_descale=v_descale)
    options = dict(cu_seqlens_out=starts, **case.selection, **descales)
    compact_kv(case.k, case.v, out_k=pool_k, out_v=pool_v, **options)
    used = torch.tensor(case.counts, dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(1)
    new = [torch.randn(4, 1, 1, 64, generator=generator).to(device, BFLOAT) for _ in range(2)]
    append_kv(*new, pool_k, pool_v, starts, used, **descales)
    q = torch.randn(4, 2, 64, generator=generator).to(device, BFLOAT)
    one_row, longest = torch.arange(5, dtype=torch.int32, device=device), 200 + HEAD_ROOM
    lengths = (one_row, starts, 1, longest)
    out = varlen_decode(q, pool_k, pool_v, *lengths, causal=True, seqused_k=used, **descales)
    parts, same_dtype = [], []
    for s, n in enumerate(case.counts):
        k, v = (
            codes_of(torch.cat([kept_rows(case, x, s), row[s, :, 0]]), scale[s]).float() * scale[s]
            for x, row, scale in zip((case.k, case.v), new, (k_descale, v_descale), strict=True)
        )
        assert len(k) == n + 1
        for dtype, results in ((FLOAT, parts), (BFLOAT, same_dtype)):
            weights = (q[s].to(dtype) @ k.to(dtype).T * 64**-0.5).softmax(-1)
            results.append(weights @ v.to(dtype))
    assert_accurate(out, torch.stack(same_dtype), torch.stack(parts))


def decode_arguments(device: torch.device) -> dict[str, Any]:
    cache = fp8_cache([2], [200], device=device)
    x = cache.batch
    starts = dict(cu_seqlens_q=x.cu_seqlens_q, cu_seqlens_k=x.cu_seqlens_k)
    return dict(q=x.q, k=x.k, v=x.v, **starts, max_seqlen_q=2, max_seqlen_k=200, **cache.descales)


BAD_DECODE: dict[str, dict[str, Any]] = {
    "k_descale: got None": dict(k_descale=None),
    "v_descale: got None": dict(v_descale=None),
    "k_descale: got shape": dict(k_descale=torch.ones(2)),
    "v_descale: got dtype": dict(v_descale=torch.ones(1, 2).half()),
    "k_descale: got a tensor": dict(k=torch.zeros(200, 2, 64).half()),
    "k: got dtype torch.float32": dict(k=torch.zeros(200, 2, 64)),
}


@pytest.mark.parametrize(("name", "change"), BAD_DECODE.items())
def test_decode_refuses_by_name(device, monkeypatch, name: str, change: dict[str, Any]) -> None:
    monkeypatch.setattr(decode, "_split_kernel", None)
    change = {key: x if x is None else x.to(device) for key, x in change.items()}
    with pytest.raises(ValueError, match=f"^{name}"):
        varlen_decode(**(decode_arguments(device) | change))
