"""varlen_decode against the fp32 reference and torch's SDPA, over shapes, dtypes and options.

What must hold whatever they say is in test_decode_properties.py; the launch, and what the host
refuses, in test_decode_launch.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import (
    MEANT_INFINITIES,
    assert_accurate,
    assert_decode_accurate,
    assert_frame_is_intact,
    assert_identical,
    framed,
    random_varlen,
    run_decode,
    sequences,
    visible_keys,
)

from vlcache_triton.kernels import decode, reference
from vlcache_triton.kernels.decode import (
    DecodeLaunch,
    decode_launch,
    decode_workspace,
    varlen_decode,
)

pytestmark = MEANT_INFINITIES

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
INTERPRETED = 4  # multiprocessors that stand in for the interpreter's


CASES = {
    "one row, one key": dict(lengths_q=[1], lengths_k=[1]),
    "odd lengths": dict(
        lengths_q=[1, 1, 1], lengths_k=[63, 1, 111], num_heads=3, num_kv_heads=3, d=80, dtype=BFLOAT
    ),
    "2000 keys": dict(lengths_q=[1], lengths_k=[2000], num_heads=8, d=128, dtype=BFLOAT),
    "2000 keys on pages": dict(
        lengths_q=[2], lengths_k=[2000], num_heads=8, num_kv_heads=1, page_size=16
    ),
    "2000 and 63 live keys": dict(
        lengths_q=[1, 3],
        lengths_k=[2010, 111],
        used=[2000, 63],
        num_heads=7,
        num_kv_heads=1,
        d=96,
        dtype=FLOAT,
    ),
    "16 rows": dict(lengths_q=[16], lengths_k=[111], num_heads=8, num_kv_heads=1, d=128),
    "16 rows of 7 heads": dict(
        lengths_q=[16, 5], lengths_k=[150, 63], num_heads=7, num_kv_heads=1, d=80, dtype=BFLOAT
    ),
    "12 rows of 4 heads": dict(lengths_q=[12], lengths_k=[300], num_kv_heads=1, d=64),
    "rows of all lengths": dict(
        lengths_q=[5, 0, 16, 2, 9], lengths_k=[63, 111, 16, 1, 70], num_heads=4, dtype=FLOAT
    ),
    "rows only": dict(lengths_q=[16, 3], lengths_k=[16, 3], dtype=BFLOAT),
    "empty sequences": dict(lengths_q=[0, 3, 4, 0, 0], lengths_k=[7, 0, 40, 0, 90], dtype=FLOAT),
    "no rows": dict(lengths_q=[0, 0], lengths_k=[7, 9]),
    "no keys": dict(lengths_q=[2, 3], lengths_k=[0, 0]),
    "no sequences": dict(lengths_q=[], lengths_k=[]),
    "live keys": dict(lengths_q=[5, 1, 8], lengths_k=[111, 63, 200], used=[70, 0, 200]),
    "pages of 1": dict(lengths_q=[1, 2], lengths_k=[63, 111], page_size=1, dtype=BFLOAT, d=96),
    "pages of 16, live": dict(
        lengths_q=[5, 0, 1], lengths_k=[63, 30, 211], used=[1, 30, 200], page_size=16, dtype=FLOAT
    ),
    "pages of 100": dict(lengths_q=[1, 1], lengths_k=[63, 311], page_size=100, d=128, d_v=64),
    "ragged": dict(
        lengths_q=[1] * 6,
        lengths_k=[40, 130, 5, 70, 64, 239],
        used=[33, 111, 1, 63, 64, 200],
        num_heads=4,
        num_kv_heads=1,
        d=128,
        dtype=BFLOAT,
    ),
    "ragged pages, 3 rows": dict(
        lengths_q=[3] * 4,
        lengths_k=[40, 130, 7, 70],
        used=[33, 111, 5, 63],
        num_heads=8,
        num_kv_heads=1,
        page_size=16,
    ),
    "group 1": dict(lengths_q=[1, 4], lengths_k=[200, 63], num_heads=2, d=64, d_v=128, dtype=FLOAT),
    "group 7": dict(lengths_q=[1], lengths_k=[333], num_heads=14, d=128, dtype=FLOAT),
    "group 8": dict(lengths_q=[2, 1], lengths_k=[130, 63], num_heads=16, d=96, d_v=80),
    "head size 256": dict(lengths_q=[1, 3], lengths_k=[111, 63], d=256, dtype=BFLOAT),
    "head size 256, fp32": dict(lengths_q=[1], lengths_k=[63], d=256, d_v=64, dtype=FLOAT),
    "head sizes 80 and 48": dict(lengths_q=[2], lengths_k=[150], d=80, d_v=48, dtype=FLOAT),
    "head sizes 40 and 256": dict(lengths_q=[1], lengths_k=[70], d=40, d_v=256),
    "head size 1": dict(lengths_q=[3], lengths_k=[70], d=1, dtype=FLOAT),
}


@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES.keys())
def test_equals_reference(device: torch.device, shapes: dict[str, Any]) -> None:
    batch = random_varlen(**shapes, device=device)
    assert_decode_accurate(run_decode(varlen_decode, batch), batch)


BIASED = (
    "one row, one key",
    "odd lengths",
    "16 rows of 7 heads",
    "empty sequences",
    "no sequences",
    "ragged",
    "ragged pages, 3 rows",
    "head size 256, fp32",
)


@pytest.mark.parametrize("name", BIASED)
def test_equals_reference_with_a_bias_of_the_first_key(device: torch.device, name: str) -> None:
    batch = random_varlen(**CASES[name], device=device)
    num_segments = len(CASES[name]["lengths_q"]) * batch.k.shape[-2]
    bias = torch.tensor([6.0, -2.0, 0.0, 3.5, 9.0] * 3, device=device)[:num_segments]
    for options in ({}, dict(causal=False, softcap=2.0), dict(causal=False, window_size=(-1, 5))):
        options |= dict(first_key_bias=bias)
        assert_decode_accurate(run_decode(varlen_decode, batch, **options), batch, **options)


def launch_of(shapes: dict[str, Any]) -> DecodeLaunch:
    """The launch of a case in the interpreter."""
    x = random_varlen(**shapes)
    head_size, num_kv_heads = max(x.q.shape[-1], x.v.shape[-1]), x.k.shape[-2]
    return decode_launch(
        head_size,
        x.q.element_size(),
        x.q.shape[1] // num_kv_heads,
        num_kv_heads,
        len(shapes["lengths_q"]),
        x.max_seqlen_q,
        x.max_seqlen_k,
        INTERPRETED,
    )


def test_the_cases_cover_the_launches() -> None:
    launches = [launch_of(shapes) for shapes in CASES.values()]
    kinds = {(x.num_splits > 1, x.num_row_blocks > 1) for x in launches}
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}
    assert {x.BLOCK_M for x in launches} == {16, 32, 64}
    assert {x.BLOCK_N for x in launches} == {16, 32}


OPTIONS: dict[str, dict[str, Any]] = {
    "not causal": dict(causal=False),
    "window left": dict(window_size=(20, -1)),
    "window left, not causal": dict(window_size=(20, -1), causal=False),
    "window right": dict(window_size=(-1, 9), causal=False),
    "window right is unused where causal": dict(window_size=(-1, 9)),
    "window both": dict(window_size=(70, 2), causal=False),
    "window of one key": dict(window_size=(0, 0)),
    "window beyond all keys": dict(window_size=(1000, 1000), causal=False),
    "softcap": dict(softcap=1.5),
    "softcap and window": dict(softcap=30.0, window_size=(63, -1)),
    "scale": dict(softmax_scale=0.5),
    "scale 0": dict(softmax_scale=0.0, causal=False),
    "all": dict(softcap=2.0, softmax_scale=-0.3, window_size=(90, 3), causal=False),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(device: torch.device, options: dict[str, Any]) -> None:
    """Over several splits and row blocks whose ends lie within a token's heads; dead rows."""
    batch = random_varlen(
        [9, 0, 1, 6],
        [150, 30, 140, 4],
        used=[131, 30, 140, 4],
        num_heads=7,
        num_kv_heads=1,
        d=80,
        d_v=48,
        dtype=FLOAT,
        page_size=16 if "window_size" in options else None,
        device=device,
    )
    assert_decode_accurate(run_decode(varlen_decode, batch, **options), batch, **options)


def test_causal_is_off_by_default(device: torch.device) -> None:
    """As in flash-attn, which callers may have called before."""
    batch = random_varlen([5], [40], device=device)
    arguments = (batch.q, batch.k, batch.v, batch.cu_seqlens_q, batch.cu_seqlens_k, 5, 40)
    for function in (varlen_decode, reference.varlen_decode):
        off, on = (function(*arguments, causal=causal) for causal in (False, True))
        assert torch.equal(function(*arguments), off)
        assert torch.equal(off[-1], on[-1]) and not torch.equal(off[0], on[0])


@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_any_number_of_splits(device, monkeypatch, multiprocessors: int) -> None:
    batch = random_varlen([1, 3], [2000, 111], num_heads=2, num_kv_heads=1, device=device)
    monkeypatch.setattr(decode, "num_multiprocessors", lambda _: multiprocessors)
    for options in ({}, {"window_size": (100, -1)}):
        assert_decode_accurate(run_decode(varlen_decode, batch, **options), batch, **options)


def test_more_splits_than_are_combined_at_once(device, monkeypatch) -> None:
    """Splits of the least size: 79 of the longest sequence, 32 and 1 of the others."""
    lengths = [79 * 32 - 1, 32 * 32, 31]
    batch = random_varlen([1, 1, 1], lengths, num_heads=2, num_kv_heads=1, d=16, device=device)
    batch.k[32 * 32 : 79 * 32 - 1] *= 3  # so that the maximum rises behind the first 32
    monkeypatch.setattr(decode, "num_multiprocessors", lambda _: 1000)
    assert decode_workspace(batch.q, batch.v, 3, 1, lengths[0]).numel() == 79 * 3 * 2 * 17
    assert_decode_accurate(run_decode(varlen_decode, batch), batch)


def test_many_sequences_of_unequal_length(device) -> None:
    """Some empty, one long."""
    num_seqs = 31
    used = [(37 * i) % 50 for i in range(num_seqs)]
    used[num_seqs // 2] = 700
    capacities = [n + i % 3 for i, n in enumerate(used)]
    shapes: dict[str, Any] = dict(num_heads=2, num_kv_heads=1, d=16, device=device)
    batch = random_varlen([1] * num_seqs, capacities, used=used, **shapes)
    actual = run_decode(varlen_decode, batch)
    assert_decode_accurate(actual, batch)
    assert_identical(run_decode(varlen_decode, batch), actual)


@pytest.mark.parametrize("page_size", [None, 16])
def test_no_length_is_believed_beyond_its_memory(device, page_size: int | None) -> None:
    """A segment that was filled too far gives what is in it, and nothing of its neighbour."""
    shapes: dict[str, Any] = dict(lengths_q=[1, 1, 2], lengths_k=[48, 160, 64], device=device)
    full = random_varlen(**shapes, used=[48, 160, 64], page_size=page_size)
    if full.block_table is not None:
        full.block_table = full.block_table[:, : 160 // 16]
        full.seqused_k[0] = 48  # its table goes on with pages that nothing may read
    expected = run_decode(varlen_decode, full)
    beyond = full.seqused_k + torch.tensor([0, 9, 0], device=device).int()
    if page_size is None:
        beyond += torch.tensor([7, 0, 5000], device=device).int()
    too_long = replace(full, seqused_k=beyond)
    assert_identical(run_decode(varlen_decode, too_long), expected)
    assert_identical(
        run_decode(reference.varlen_decode, too_long), run_decode(reference.varlen_decode, full)
    )


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (dict(lengths_q=[1, 5], lengths_k=[333, 63], num_heads=8, d=128), {}),
        (dict(lengths_q=[3, 1], lengths_k=[90, 111], d=80, d_v=64, page_size=16), {}),
        (
            dict(lengths_q=[4, 2], lengths_k=[150, 63], used=[140, 40], dtype=FLOAT),
            dict(window_size=(30, 5), causal=False, softmax_scale=0.2),
        ),
    ],
)
def test_equals_sdpa(device, shapes: dict[str, Any], options: dict[str, Any]) -> None:
    batch = random_varlen(**shapes, device=device)
    out, _ = run_decode(varlen_decode, batch, **options)
    visibility = {k: v for k, v in options.items() if k != "softmax_scale"}
    expected, same_dtype = [], []
    for q, k, v in sequences(batch):
        visible = visible_keys(q.shape[1], k.shape[1], **visibility, device=device)
        for parts, cast in ((expected, FLOAT), (same_dtype, q.dtype)):
            part = F.scaled_dot_product_attention(
                *(x[None].to(cast) for x in (q, k, v)),
                attn_mask=visible,
                scale=options.get("softmax_scale"),
            )
            parts.append(part[0].transpose(0, 1))
    assert_accurate(out, torch.cat(same_dtype), torch.cat(expected), floor=1e-4)


@pytest.mark.parametrize("length", [40, 111], ids=["direct", "split"])
def test_writes_out_and_nothing_else(device: torch.device, length: int) -> None:
    batch = random_varlen([2, 5], [length, length], d=80, d_v=48, device=device)
    before = [x.clone() for x in (batch.q, batch.k, batch.v)]
    expected, _ = run_decode(varlen_decode, batch)
    out, frame = framed(torch.full_like(expected, torch.nan))
    needed = decode_workspace(batch.q, batch.v, 2, 5, length)
    workspace, workspace_frame = framed(needed)
    result = run_decode(
        varlen_decode, batch, out=out, workspace=workspace, return_softmax_lse=False
    )
    assert result is out
    assert (needed.numel() == 0) == (length == 40)
    assert not workspace.isnan().any()  # all of it is needed
    assert_identical([out], [expected])
    assert_frame_is_intact(frame)
    assert_frame_is_intact(workspace_frame)
    assert_identical([batch.q, batch.k, batch.v], before)


@pytest.mark.parametrize("longest", [20, 300], ids=["direct", "split"])
def test_rows_that_see_no_key(device: torch.device, longest: int) -> None:
    batch = random_varlen([6, 2, 1], [4, 0, longest], num_heads=2, device=device)
    out, lse = run_decode(varlen_decode, batch)
    blind = torch.tensor([True, True, False, False, False, False, True, True, False])
    assert torch.equal(out.cpu().count_nonzero((1, 2)) == 0, blind)
    assert torch.equal((lse == -torch.inf).all(0).cpu(), blind)
    assert lse[:, ~blind.to(device)].isfinite().all()


@pytest.mark.parametrize("size", [10.0, 100.0])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_extreme_logits(device: torch.device, size: float, softcap: float) -> None:
    """One key takes all of the attention, the others underflow: no overflow, no NaN."""
    batch = random_varlen([2], [130], num_heads=2, num_kv_heads=2, dtype=FLOAT, device=device)
    batch.q[:] = size
    batch.k[:] = -size
    batch.k[42] = size
    out, lse = run_decode(varlen_decode, batch, softcap=softcap)
    torch.testing.assert_close(out, batch.v[42].expand(2, 2, 64), rtol=1e-5, atol=1e-6)
    expected = torch.tensor(softcap or 8 * size**2, device=device)
    torch.testing.assert_close(lse, expected.expand(2, 2), rtol=1e-5, atol=0)
