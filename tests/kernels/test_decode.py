"""varlen_decode against the fp32 reference and torch's SDPA, and what must hold whatever they say.

The launch, and what the host refuses, are in test_decode_launch.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    NO_PAGE,
    Varlen,
    assert_accurate,
    assert_frame_is_intact,
    assert_identical,
    cumulative,
    framed,
    plain_attention,
    random_varlen,
    sequences,
    visible_keys,
)

from vlcache_triton import reference
from vlcache_triton.kernels import decode
from vlcache_triton.kernels.decode import (
    DecodeLaunch,
    append_kv,
    decode_launch,
    decode_workspace,
    varlen_decode,
)

# Of the interpreter: log2(0) of rows that see no key, exp2 in the softcap; -inf and inf by design.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
INTERPRETED = 4  # multiprocessors that stand in for the interpreter's


def run(function: Any, batch: Varlen, **options: Any) -> Any:
    """Either implementation on a batch; gives the log-sum-exp as well."""
    return function(
        batch.q,
        batch.k,
        batch.v,
        batch.cu_seqlens_q,
        batch.cu_seqlens_k,
        batch.max_seqlen_q,
        batch.max_seqlen_k,
        **(batch.cache | {"return_softmax_lse": True} | options),
    )


def assert_equals_reference(actual: Any, batch: Varlen, **options: Any) -> None:
    """Output within twice the error of plain torch, log-sum-exp to fp32's precision."""
    out, lse = actual
    expected, expected_lse = run(
        reference.varlen_decode, replace(batch, q=batch.q.float()), **options
    )
    assert out.dtype == batch.q.dtype
    assert_accurate(out, plain_attention(batch, **options), expected)
    assert lse.dtype == FLOAT
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)


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
    assert_equals_reference(run(varlen_decode, batch), batch)


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
    assert {x.BLOCK_N for x in launches} == {16, 32, 64}


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
    assert_equals_reference(run(varlen_decode, batch, **options), batch, **options)


@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_any_number_of_splits(device, monkeypatch, multiprocessors: int) -> None:
    batch = random_varlen([1, 3], [2000, 111], num_heads=2, num_kv_heads=1, device=device)
    monkeypatch.setattr(decode, "num_multiprocessors", lambda _: multiprocessors)
    for options in ({}, {"window_size": (100, -1)}):
        assert_equals_reference(run(varlen_decode, batch, **options), batch, **options)


def test_more_splits_than_are_combined_at_once(device, monkeypatch) -> None:
    """Splits of the least size: 79 of the longest sequence, 64 and 1 of the others."""
    lengths = [5000, 4096, 63]
    batch = random_varlen([1, 1, 1], lengths, num_heads=2, num_kv_heads=1, d=16, device=device)
    monkeypatch.setattr(decode, "num_multiprocessors", lambda _: 1000)
    assert decode_workspace(batch.q, batch.v, 3, 1, 5000).numel() == 79 * 3 * 2 * 17
    assert_equals_reference(run(varlen_decode, batch), batch)


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
    out, _ = run(varlen_decode, batch, **options)
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


def test_pages_change_nothing(device: torch.device) -> None:
    shapes: dict[str, Any] = dict(lengths_q=[5, 9], lengths_k=[111, 63], device=device)
    expected = run(varlen_decode, random_varlen(**shapes))
    for page_size in (1, 16, 100):
        paged = random_varlen(**shapes, page_size=page_size)
        assert_identical(run(varlen_decode, paged), expected)


def test_table_entries_behind_the_live_keys_are_never_read(device: torch.device) -> None:
    shapes: dict[str, Any] = dict(lengths_q=[1, 2, 3], lengths_k=[200, 111, 63], device=device)
    live = dict(used=[130, 16, 0], page_size=16)
    expected = run(varlen_decode, random_varlen(**shapes, used=live["used"]))
    batch = random_varlen(**shapes, **live)
    assert batch.block_table is not None
    for row, used in zip(batch.block_table, [130, 16, 0], strict=True):
        row[-(-used // 16) :] = NO_PAGE
    assert_identical(run(varlen_decode, batch), expected)


def test_strides_change_nothing(device: torch.device) -> None:
    """Caches as Transformers has them, each of its own strides; q out of a fused projection."""
    batch = random_varlen([5, 9], [111, 63], num_heads=4, d=80, device=device)
    expected = run(varlen_decode, batch)
    batch.q = torch.cat([batch.q, batch.q], 1)[:, :4]
    batch.k = batch.k.transpose(0, 1).contiguous().transpose(0, 1)  # [H, S, D]
    batch.v = framed(batch.v)[0]
    assert not (batch.q.is_contiguous() or batch.k.is_contiguous() or batch.v.is_contiguous())
    assert_identical(run(varlen_decode, batch), expected)
    paged = random_varlen([5, 9], [111, 63], num_heads=4, d=80, page_size=16, device=device)
    paged.k = paged.k.transpose(1, 2).contiguous().transpose(1, 2)  # [blocks, H, page_size, D]
    paged.v = framed(paged.v)[0]
    assert_identical(run(varlen_decode, paged), expected)


def test_the_ragged_layout_is_a_batch_of_heads(device: torch.device) -> None:
    """Each KV head as a sequence of its own, with head room, gives the same bits."""
    lengths, num_heads, num_kv_heads, d, room = [111, 63, 111], 8, 2, 64, 5
    batch = random_varlen([1, 1, 1], lengths, num_heads=num_heads, device=device)
    out, lse = run(varlen_decode, batch)
    starts = batch.cu_seqlens_k.tolist()
    pools = []
    for x in (batch.k, batch.v):
        spare = torch.full((room, 1, d), torch.nan, dtype=x.dtype, device=device)
        parts = [
            torch.cat([x[start : start + n, h : h + 1], spare])
            for start, n in zip(starts[:-1], lengths, strict=True)
            for h in range(num_kv_heads)
        ]
        pools.append(torch.cat(parts))
    segments = [n for n in lengths for _ in range(num_kv_heads)]
    ragged = Varlen(
        batch.q.view(len(segments), num_heads // num_kv_heads, d),
        *pools,
        cumulative([1] * len(segments), device),
        cumulative([n + room for n in segments], device),
        1,
        111,
        torch.tensor(segments, dtype=torch.int32, device=device),
        None,
    )
    actual, actual_lse = run(varlen_decode, ragged)
    assert_identical(
        [actual.view_as(out), actual_lse.T.reshape(3, -1).T], [out, lse]
    )  # [group, segments] -> [num_heads, num_seqs]


@pytest.mark.parametrize("length", [40, 111], ids=["direct", "split"])
def test_writes_out_and_nothing_else(device: torch.device, length: int) -> None:
    batch = random_varlen([2, 5], [length, length], d=80, d_v=48, device=device)
    before = [x.clone() for x in (batch.q, batch.k, batch.v)]
    expected, _ = run(varlen_decode, batch)
    out, frame = framed(torch.full_like(expected, torch.nan))
    needed = decode_workspace(batch.q, batch.v, 2, 5, length)
    workspace, workspace_frame = framed(needed)
    result = run(varlen_decode, batch, out=out, workspace=workspace, return_softmax_lse=False)
    assert result is out
    assert (needed.numel() == 0) == (length == 40)
    assert not workspace.isnan().any()  # all of it is needed
    assert_identical([out], [expected])
    assert_frame_is_intact(frame)
    assert_frame_is_intact(workspace_frame)
    assert_identical([batch.q, batch.k, batch.v], before)


def test_rows_without_a_sequence_are_not_written(device: torch.device) -> None:
    batch = random_varlen([2, 3], [63, 200], device=device)
    expected, _ = run(varlen_decode, batch)
    longer = torch.cat([batch.q, torch.full_like(batch.q, torch.nan)])
    out = torch.full_like(longer, -7.0)
    run(varlen_decode, replace(batch, q=longer), out=out)
    assert_identical([out[:5]], [expected])
    assert (out[5:] == -7.0).all()


@pytest.mark.parametrize("longest", [20, 300], ids=["direct", "split"])
def test_rows_that_see_no_key(device: torch.device, longest: int) -> None:
    batch = random_varlen([6, 2, 1], [4, 0, longest], num_heads=2, device=device)
    out, lse = run(varlen_decode, batch)
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
    out, lse = run(varlen_decode, batch, softcap=softcap)
    torch.testing.assert_close(out, batch.v[42].expand(2, 2, 64), rtol=1e-5, atol=1e-6)
    expected = torch.tensor(softcap or 8 * size**2, device=device)
    torch.testing.assert_close(lse, expected.expand(2, 2), rtol=1e-5, atol=0)


def test_log_sum_exps_merge_two_caches(device: torch.device) -> None:
    batch = random_varlen([1, 2], [150, 63], dtype=FLOAT, device=device)
    whole, whole_lse = run(varlen_decode, batch, causal=False)
    split = [100, 20]
    used = torch.tensor(split, dtype=torch.int32, device=device)
    outs, lses = zip(
        run(varlen_decode, replace(batch, seqused_k=used), causal=False),
        run(
            varlen_decode,
            replace(
                batch,
                k=torch.cat([batch.k[100:150], batch.k[170:]]),
                v=torch.cat([batch.v[100:150], batch.v[170:]]),
                cu_seqlens_k=cumulative([50, 43], device),
            ),
            causal=False,
        ),
        strict=True,
    )
    lse = torch.stack(lses)
    torch.testing.assert_close(lse.logsumexp(0), whole_lse, rtol=1e-6, atol=1e-5)
    weights = (lse - whole_lse).exp().transpose(1, 2)[..., None]
    torch.testing.assert_close((weights * torch.stack(outs)).sum(0), whole, rtol=1e-5, atol=1e-5)


def test_runs_agree_bit_for_bit(device: torch.device) -> None:
    batch = random_varlen([3, 1], [500, 111], num_heads=4, d=128, device=device)
    first = run(varlen_decode, batch)
    assert_identical(run(varlen_decode, batch), first)


# Few enough keys for splits of the least size whatever the batch, so that its sequences, alone or
# in another order, are computed by the same steps: equal to the bit where the bounds are the same.
lengths = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 160)), min_size=1, max_size=3)


@settings(derandomize=True, max_examples=8, deadline=None)
@given(lengths, st.randoms(use_true_random=False))
def test_sequences_do_not_touch_each_other(pairs, random) -> None:
    """A batch gives what its sequences give alone, in any order of the batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths_q, lengths_k = map(list, zip(*pairs, strict=True))
    batch = random_varlen(lengths_q, lengths_k, num_heads=2, num_kv_heads=1, device=device)
    out, lse = run(varlen_decode, batch)
    queries, outs, lses = batch.q.split(lengths_q), out.split(lengths_q), lse.split(lengths_q, 1)
    keys, values = batch.k.split(lengths_k), batch.v.split(lengths_k)

    def some(indices: list[int]) -> Varlen:
        return replace(
            batch,
            q=torch.cat([queries[i] for i in indices]),
            k=torch.cat([keys[i] for i in indices]),
            v=torch.cat([values[i] for i in indices]),
            cu_seqlens_q=cumulative([lengths_q[i] for i in indices], device),
            cu_seqlens_k=cumulative([lengths_k[i] for i in indices], device),
        )

    order = list(range(len(pairs)))
    random.shuffle(order)
    for indices in [order, *([i] for i in order)]:
        expected = [
            torch.cat([outs[i] for i in indices]),
            torch.cat([lses[i] for i in indices], 1),
        ]
        assert_identical(run(varlen_decode, some(indices)), expected)


@settings(derandomize=True, max_examples=6, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(0, 150),
    st.sampled_from([torch.nan, torch.inf, -torch.inf, 6e4]),
    st.sampled_from([None, 1, 16]),
)
def test_what_lies_behind_the_live_keys_is_nothing(n_q, used, rubbish, page_size) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = random_varlen(
        [n_q, 1], [150, 40], used=[used, 40], page_size=page_size, num_heads=2, device=device
    )
    for x in (batch.k, batch.v):
        x.nan_to_num_(nan=0.5)
    expected = run(varlen_decode, batch)
    dirty = random_varlen(
        [n_q, 1], [150, 40], used=[used, 40], page_size=page_size, num_heads=2, device=device
    )
    for x in (dirty.k, dirty.v):
        x.masked_fill_(x.isnan(), rubbish)
    assert_identical(run(varlen_decode, dirty), expected)


@settings(derandomize=True, max_examples=4, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=3), st.integers(2, 4))
def test_rows_together_equal_rows_one_by_one(lengths_k: list[int], n: int) -> None:
    """n rows in one call are n calls of one row, each after its key was appended."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_seqs, capacities = len(lengths_k), [length + n for length in lengths_k]
    batch = random_varlen(
        [n] * num_seqs, capacities, num_heads=2, num_kv_heads=1, dtype=FLOAT, device=device
    )
    expected, _ = run(varlen_decode, batch)
    used = torch.tensor(lengths_k, dtype=torch.int32, device=device)
    k, v = torch.full_like(batch.k, torch.nan), torch.full_like(batch.v, torch.nan)
    rows = torch.arange(n, device=device) + (batch.cu_seqlens_k[:-1] + used)[:, None]
    for start, length in zip(batch.cu_seqlens_k.tolist(), lengths_k, strict=False):
        k[start : start + length] = batch.k[start : start + length]
        v[start : start + length] = batch.v[start : start + length]
    queries, steps = batch.q.view(num_seqs, n, *batch.q.shape[1:]), []
    for i in range(n):
        new = rows[:, i : i + 1]
        append_kv(batch.k[new], batch.v[new], k, v, batch.cu_seqlens_k, used)
        step = replace(
            batch,
            q=queries[:, i],
            k=k,
            v=v,
            seqused_k=used,
            cu_seqlens_q=cumulative([1] * num_seqs, device),
            max_seqlen_q=1,
        )
        steps.append(run(varlen_decode, step)[0])
    actual = torch.stack(steps, 1).view_as(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
