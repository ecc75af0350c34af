"""What must hold for varlen_decode whatever the reference says: layouts, order, repeatability."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    MEANT_INFINITIES,
    NO_PAGE,
    Varlen,
    assert_identical,
    cumulative,
    framed,
    random_varlen,
    run_decode,
    vast_zeros,
)

from vlcache_triton.kernels import decode
from vlcache_triton.kernels.decode import append_kv, varlen_decode

pytestmark = MEANT_INFINITIES


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("n", [7, 300])
def test_a_first_key_of_bias_log_n_is_n_keys(device: torch.device, n: int, rows: int) -> None:
    """In one piece and in splits, of which only the first has the bias."""
    few = random_varlen([rows, rows], [63, 400], num_kv_heads=1, dtype=torch.float32, device=device)
    starts = few.cu_seqlens_k.tolist()
    many = {}
    for name in ("k", "v"):
        x = getattr(few, name)
        parts = [
            torch.cat([x[a : a + 1].expand(n - 1, -1, -1), x[a:b]]) for a, b in pairwise(starts)
        ]
        many[name] = torch.cat(parts)
    lengths = [63 + n - 1, 400 + n - 1]
    copied = replace(
        few, **many, cu_seqlens_k=cumulative(lengths, device), max_seqlen_k=max(lengths)
    )
    bias = torch.full((2,), math.log(n), device=device)
    out = run_decode(varlen_decode, few, first_key_bias=bias)
    for x, expected in zip(out, run_decode(varlen_decode, copied), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_a_first_key_of_bias_minus_infinity_is_not_there(device: torch.device) -> None:
    """Where it is the only key, nothing is seen: 0, and not NaN."""
    shapes: dict[str, Any] = dict(num_kv_heads=1, num_heads=2, dtype=torch.float32, device=device)
    batch = random_varlen([1, 1, 1], [64, 1, 300], **shapes)
    hidden = torch.full((3,), -torch.inf, device=device)
    out, lse = run_decode(varlen_decode, batch, first_key_bias=hidden)
    keep = torch.ones(365, dtype=torch.bool)
    keep[[0, 64, 65]] = False
    without = replace(
        batch,
        k=batch.k[keep.to(device)],
        v=batch.v[keep.to(device)],
        cu_seqlens_k=cumulative([63, 0, 299], device),
    )
    expected, expected_lse = run_decode(varlen_decode, without)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)
    assert not out[1].any() and (lse[:, 1] == -torch.inf).all()


def test_a_bias_of_0_changes_nothing(device: torch.device) -> None:
    batch = random_varlen([2, 5], [300, 63], device=device)
    bias = torch.zeros(4, device=device)
    biased = run_decode(varlen_decode, batch, first_key_bias=bias)
    for x, expected in zip(biased, run_decode(varlen_decode, batch), strict=True):
        torch.testing.assert_close(x, expected)


def test_pages_change_nothing(device: torch.device) -> None:
    shapes: dict[str, Any] = dict(lengths_q=[5, 9], lengths_k=[111, 63], device=device)
    expected = run_decode(varlen_decode, random_varlen(**shapes))
    for page_size in (1, 16, 100):
        paged = random_varlen(**shapes, page_size=page_size)
        assert_identical(run_decode(varlen_decode, paged), expected)


def test_table_entries_behind_the_live_keys_are_never_read(device: torch.device) -> None:
    shapes: dict[str, Any] = dict(lengths_q=[1, 2, 3], lengths_k=[200, 111, 63], device=device)
    live = dict(used=[130, 16, 0], page_size=16)
    expected = run_decode(varlen_decode, random_varlen(**shapes, used=live["used"]))
    batch = random_varlen(**shapes, **live)
    assert batch.block_table is not None
    for row, used in zip(batch.block_table, [130, 16, 0], strict=True):
        row[-(-used // 16) :] = NO_PAGE
    assert_identical(run_decode(varlen_decode, batch), expected)


def test_strides_change_nothing(device: torch.device) -> None:
    """Caches as Transformers has them, each of its own strides; q out of a fused projection."""
    batch = random_varlen([5, 9], [111, 63], num_heads=4, d=80, device=device)
    expected = run_decode(varlen_decode, batch)
    batch.q = torch.cat([batch.q, batch.q], 1)[:, :4]
    batch.k = batch.k.transpose(0, 1).contiguous().transpose(0, 1)  # [H, S, D]
    batch.v = framed(batch.v)[0]
    assert not (batch.q.is_contiguous() or batch.k.is_contiguous() or batch.v.is_contiguous())
    assert_identical(run_decode(varlen_decode, batch), expected)
    paged = random_varlen([5, 9], [111, 63], num_heads=4, d=80, page_size=16, device=device)
    paged.k = paged.k.transpose(1, 2).contiguous().transpose(1, 2)  # [blocks, H, page_size, D]
    paged.v = framed(paged.v)[0]
    assert_identical(run_decode(varlen_decode, paged), expected)


def test_the_ragged_layout_is_a_batch_of_heads(device: torch.device) -> None:
    """Each KV head as a sequence of its own, with head room, gives the same bits."""
    lengths, num_heads, num_kv_heads, d, room = [111, 63, 111], 8, 2, 64, 5
    batch = random_varlen([1, 1, 1], lengths, num_heads=num_heads, device=device)
    out, lse = run_decode(varlen_decode, batch)
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
    actual, actual_lse = run_decode(varlen_decode, ragged)
    assert_identical(
        [actual.view_as(out), actual_lse.T.reshape(3, -1).T], [out, lse]
    )  # [group, segments] -> [num_heads, num_seqs]


def test_rows_without_a_sequence_are_not_written(device: torch.device) -> None:
    batch = random_varlen([2, 3], [63, 200], device=device)
    expected, _ = run_decode(varlen_decode, batch)
    longer = torch.cat([batch.q, torch.full_like(batch.q, torch.nan)])
    out = torch.full_like(longer, -7.0)
    run_decode(varlen_decode, replace(batch, q=longer), out=out)
    assert_identical([out[:5]], [expected])
    assert (out[5:] == -7.0).all()


def test_log_sum_exps_merge_two_caches(device: torch.device) -> None:
    batch = random_varlen([1, 2], [150, 63], dtype=torch.float32, device=device)
    whole, whole_lse = run_decode(varlen_decode, batch, causal=False)
    split = [100, 20]
    used = torch.tensor(split, dtype=torch.int32, device=device)
    outs, lses = zip(
        run_decode(varlen_decode, replace(batch, seqused_k=used), causal=False),
        run_decode(
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
    first = run_decode(varlen_decode, batch)
    assert_identical(run_decode(varlen_decode, batch), first)


@pytest.mark.parametrize("page_size", [None, 1, 16])
def test_caches_past_2_to_the_31_elements(device: torch.device, page_size: int | None) -> None:
    """The live rows, K and V side by side, lie behind 2^31 elements."""
    batch = random_varlen([1, 2], [111, 33], num_heads=2, num_kv_heads=1, device=device)
    expected = run_decode(varlen_decode, batch)
    first, spare = 2**31 // 128, 16
    memory = vast_zeros((first + 144 + spare) * 128, torch.float16, device).view(-1, 2, 64)
    memory[first : first + 144] = torch.cat([batch.k, batch.v], 1)
    batch.k, batch.v = memory[:, :1], memory[:, 1:]
    batch.cu_seqlens_k += first
    if page_size is not None:
        starts = [0, 111] if page_size == 1 else [0, 112]
        memory[first + starts[1] : first + starts[1] + 33] = memory[
            first + 111 : first + 144
        ].clone()
        batch.k, batch.v = (x.unflatten(0, (-1, page_size)) for x in (batch.k, batch.v))
        pages = torch.arange(111, dtype=torch.int32, device=device)
        batch.block_table = torch.stack([(first + n) // page_size + pages for n in starts])
    assert_identical(run_decode(varlen_decode, batch), expected)


def test_strides_past_2_to_the_31_elements(device: torch.device) -> None:
    """Rows of q and out, and heads of k and v, 2^30 elements apart."""
    batch = random_varlen([1, 2], [111, 33], num_heads=3, num_kv_heads=3, device=device)
    expected = run_decode(varlen_decode, batch)
    apart = 2**30
    memory = vast_zeros(2 * apart + 50000, torch.float16, device)
    batch.q = memory.as_strided((3, 3, 64), (apart, 64, 1)).copy_(batch.q)
    batch.k = memory.as_strided((144, 3, 64), (64, apart, 1), 10000).copy_(batch.k)
    batch.v = memory.as_strided((144, 3, 64), (64, apart, 1), 30000).copy_(batch.v)
    out = memory.as_strided((3, 3, 64), (apart, 64, 1), 1000)
    assert_identical(run_decode(varlen_decode, batch, out=out), expected)


# Few enough keys, on as many multiprocessors as a large GPU has, for splits of the least size
# whatever the batch, so that its sequences, alone or in another order, are computed by the same
# steps: equal to the bit. Larger batches cut their keys as is best for all together.
lengths = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 160)), min_size=1, max_size=3)


@settings(derandomize=True, max_examples=6, deadline=None)
@given(lengths, st.randoms(use_true_random=False))
def test_sequences_do_not_touch_each_other(pairs, random) -> None:
    """A batch gives what its sequences give alone, in any order of the batch."""
    with mock.patch.object(decode, "num_multiprocessors", lambda _: 132):
        check_alone_and_in_any_order(pairs, random)


def check_alone_and_in_any_order(pairs, random) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths_q, lengths_k = map(list, zip(*pairs, strict=True))
    batch = random_varlen(lengths_q, lengths_k, num_heads=2, num_kv_heads=1, device=device)
    out, lse = run_decode(varlen_decode, batch)
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
        assert_identical(run_decode(varlen_decode, some(indices)), expected)


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
    expected = run_decode(varlen_decode, batch)
    dirty = random_varlen(
        [n_q, 1], [150, 40], used=[used, 40], page_size=page_size, num_heads=2, device=device
    )
    for x in (dirty.k, dirty.v):
        x.masked_fill_(x.isnan(), rubbish)
    assert_identical(run_decode(varlen_decode, dirty), expected)


@settings(derandomize=True, max_examples=4, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=3), st.integers(2, 4))
def test_rows_together_equal_rows_one_by_one(lengths_k: list[int], n: int) -> None:
    """n rows in one call are n calls of one row, each after its key was appended."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_seqs, capacities = len(lengths_k), [length + n for length in lengths_k]
    batch = random_varlen(
        [n] * num_seqs, capacities, num_heads=2, num_kv_heads=1, dtype=torch.float32, device=device
    )
    expected, _ = run_decode(varlen_decode, batch)
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
        steps.append(run_decode(varlen_decode, step)[0])
    actual = torch.stack(steps, 1).view_as(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
