"""The kernels one after another: statistics, selection, compaction, append and decode.

What comes out must be plain attention over the full cache in which all but the kept tokens, and
what came after them, is masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    MEANT_INFINITIES,
    Varlen,
    assert_accurate,
    assert_identical,
    cumulative,
    random_varlen,
    sequences,
)
from torch import Tensor

from vlcache_triton.kernels.compact import compact_kv, compact_kv_
from vlcache_triton.kernels.decode import append_kv, varlen_decode
from vlcache_triton.kernels.score import post_vision_stats
from vlcache_triton.kernels.select import Selection, select_tokens

pytestmark = MEANT_INFINITIES

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
MANY = 2**30  # more than any length: clamped to it
Full = list[tuple[Tensor, Tensor, Tensor]]


@dataclass
class Step:
    """What a decoding step brings: n rows a sequence, of which `new` have K and V to append."""

    q: Tensor  # [num_seqs * n, num_heads, d]
    k: Tensor  # [num_seqs, new, num_kv_heads, d]; new is n, or 0 for rows appended before
    v: Tensor


@dataclass
class Compressed:
    """A layer's compacted cache, with room for more, and which tokens it holds."""

    k: Tensor
    v: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor
    block_table: Tensor | None
    kept: list[list[Tensor]]  # positions, of each sequence and KV head


def integers(values: Any, device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def make_step(batch: Varlen, n: int, new: int, seed: int = 1) -> Step:
    generator = torch.Generator().manual_seed(seed)
    num_seqs, (num_heads, d) = batch.cu_seqlens_q.numel() - 1, batch.q.shape[1:]
    shapes = (
        (num_seqs * n, num_heads, d),
        (num_seqs, new, *batch.k.shape[-2:]),
        (num_seqs, new, *batch.v.shape[-2:]),
    )
    return Step(*(torch.randn(x, generator=generator).to(batch.q) for x in shapes))


def score(batch: Varlen) -> Tensor:
    return post_vision_stats(
        batch.q,
        batch.k,
        batch.cu_seqlens_q,
        batch.cu_seqlens_k,
        batch.max_seqlen_q,
        batch.max_seqlen_k,
        **batch.cache,
    ).scores


def positions(selection: Selection, first: int, count: int) -> list[Tensor]:
    """What `count` segments from `first` on keep."""
    bounds = selection.cu_kept[first : first + count + 1].tolist()
    return [selection.indices[a:b] for a, b in pairwise(bounds)]


def compress_by_head(batch: Varlen, keep: Tensor, recent: Tensor, room: int) -> Compressed:
    """Every head with budgets of its own, `[num_kv_heads, num_seqs]`, in the ragged layout.

    Heads are selected for and compacted as layers are: one launch for all, slices of its result.
    """
    num_kv_heads, num_seqs = keep.shape
    selection = select_tokens(
        score(batch)[:, None], batch.cu_seqlens_k, keep, recent, max_seqlen=batch.max_seqlen_k
    )
    heads = [positions(selection, h * num_seqs, num_seqs) for h in range(num_kv_heads)]
    kept = [[head[i] for head in heads] for i in range(num_seqs)]
    counts = [len(x) for sequence in kept for x in sequence]
    starts = cumulative([n + room for n in counts], keep.device)
    pools = [x.new_full((int(starts[-1]), 1, x.shape[-1]), torch.nan) for x in (batch.k, batch.v)]
    for h in range(num_kv_heads):
        compact_kv(
            batch.k[..., h : h + 1, :],
            batch.v[..., h : h + 1, :],
            batch.cu_seqlens_k,
            selection.indices,
            selection.cu_kept[h * num_seqs : (h + 1) * num_seqs + 1],
            *pools,
            torch.cat([starts[h:-1:num_kv_heads], starts[-1:]]),
            max_kept=max(counts),
            block_table=batch.block_table,
        )
    return Compressed(*pools, starts, integers(counts, keep.device), None, kept)


def compress_in_place(batch: Varlen, keep: Tensor, recent: Tensor) -> Compressed:
    """Budgets of each sequence, `[num_seqs]`; the second of two layers selected for at once."""
    num_seqs, num_kv_heads = keep.numel(), batch.k.shape[-2]
    scores = score(batch)
    selection = select_tokens(
        torch.stack([-scores, scores]),
        batch.cu_seqlens_k,
        keep.expand(2, -1).contiguous(),
        recent.expand(2, -1).contiguous(),
        max_seqlen=batch.max_seqlen_k,
    )
    num_segments = num_seqs * num_kv_heads
    flat = positions(selection, num_segments, num_segments)
    kept = [flat[i * num_kv_heads : (i + 1) * num_kv_heads] for i in range(num_seqs)]
    counts = [len(heads[0]) for heads in kept]
    compact_kv_(
        batch.k,
        batch.v,
        batch.cu_seqlens_k,
        selection.indices,
        selection.cu_kept[num_segments:],
        max_kept=max(counts),
        block_table=batch.block_table,
    )
    used = integers(counts, keep.device)
    return Compressed(batch.k, batch.v, batch.cu_seqlens_k, used, batch.block_table, kept)


def decode(cache: Compressed, step: Step) -> Tensor:
    """Append the step's K and V and attend: `[num_seqs * n, num_heads, d_v]`."""
    num_seqs, new = step.k.shape[:2]
    num_segments, n = len(cache.seqused_k), len(step.q) // num_seqs
    heads = num_segments // num_seqs  # that are segments of their own
    q, k, v = (  # `[num_segments, n or new, ...]`
        x.reshape(num_seqs, -1, heads, x.shape[-2] // heads, x.shape[-1]).transpose(1, 2)
        for x in (step.q, step.k, step.v)
    )
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))
    before = cache.seqused_k.clone()
    arguments = (cache.k, cache.v, cache.cu_seqlens_k, cache.seqused_k)
    append_kv(k, v, *arguments, block_table=cache.block_table)
    assert torch.equal(cache.seqused_k, before + new)
    out = varlen_decode(
        q.flatten(0, 1),
        cache.k,
        cache.v,
        cumulative([n] * num_segments, q.device),
        cache.cu_seqlens_k,
        n,
        int(cache.cu_seqlens_k.diff().max()),
        causal=True,
        seqused_k=cache.seqused_k,
        block_table=cache.block_table,
    )
    assert isinstance(out, Tensor)
    rows = out.view(num_seqs, heads, n, -1, out.shape[-1]).transpose(1, 2)
    return rows.reshape(num_seqs * n, -1, out.shape[-1])


def full_attention(full: Full, kept: list[list[Tensor]], step: Step) -> Tensor:
    """Plain attention of the step's rows over full caches, masked to what each head keeps.

    full: of each sequence its prompt's query rows, keys and values, as `sequences` gives them.
    """
    num_seqs, new = step.k.shape[:2]
    n, num_heads = len(step.q) // num_seqs, step.q.shape[1]
    parts = []
    for i, (_, keys, values) in enumerate(full):
        group = num_heads // len(kept[i])
        visible = torch.zeros(num_heads, n, keys.shape[1] + new, dtype=torch.bool)
        for h in range(num_heads):
            visible[h, :, kept[i][h // group].long().cpu()] = True
        visible[..., keys.shape[1] :] = torch.ones(n, new, dtype=torch.bool).tril(new - n)
        hidden = ~visible.to(keys.device)
        late_k, late_v = (
            x[i].transpose(0, 1).repeat_interleave(group, 0).to(keys) for x in (step.k, step.v)
        )
        q = step.q[i * n : (i + 1) * n].transpose(0, 1).to(keys)
        logits = q @ torch.cat([keys, late_k], 1).mT * q.shape[-1] ** -0.5
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
        parts.append((weights @ torch.cat([values, late_v], 1)).transpose(0, 1))
    return torch.cat(parts)


def assert_equals_masked(
    actual: Tensor,
    full: Full,
    kept: list[list[Tensor]],
    step: Step,
) -> None:
    wide = [tuple(x.float() for x in sequence) for sequence in full]
    assert_accurate(actual, full_attention(full, kept, step), full_attention(wide, kept, step))


def assert_path_is_masked_attention(
    batch: Varlen, keep: Tensor, recent: Tensor, new: int, *, in_place: bool = False
) -> Compressed:
    """Compress, then decode what is compressed, and then with `new` rows appended."""
    full = list(sequences(batch))  # gathered, so in place leaves them alone
    compressed = (
        compress_in_place(batch, keep, recent)
        if in_place
        else compress_by_head(batch, keep, recent, new + 1)
    )
    for step in (make_step(batch, 1, 0), make_step(batch, new, new)):
        assert_equals_masked(decode(compressed, step), full, compressed.kept, step)
    return compressed


HEADS = dict(num_heads=6, num_kv_heads=2, d=64)
CASES: dict[str, dict[str, Any]] = {
    "fp16": dict(),
    "bf16": dict(dtype=BFLOAT, d=128),
    "fp32": dict(dtype=FLOAT, d_v=48),
    "one row each": dict(lengths_q=[1, 1]),
    "one sequence": dict(lengths_q=[20], lengths_k=[600]),
    "head sizes 80 and 96": dict(d=80, d_v=96),
    "8 KV heads": dict(lengths_q=[3], lengths_k=[50], num_heads=8, num_kv_heads=8),
    "pages of 1": dict(page_size=1, dtype=FLOAT),
    "pages of 16": dict(page_size=16, dtype=BFLOAT),
    "pages of 100": dict(page_size=100),
}
IN_PLACE = ("fp16", "one sequence", "pages of 1", "pages of 16")


def made(case: str, device: torch.device) -> tuple[Varlen, Tensor]:
    """A batch, and how many tokens of each sequence to keep: a quarter."""
    shapes = HEADS | dict(lengths_q=[20, 3], lengths_k=[110, 9]) | CASES[case]
    batch = random_varlen(**shapes, device=device)
    return batch, batch.cu_seqlens_k.diff() // 4 + 1


@pytest.mark.parametrize("case", CASES)
def test_decoding_is_masked_attention(device: torch.device, case: str) -> None:
    """Half of the heads keep twice as much as the others."""
    batch, keep = made(case, device)
    num_kv_heads = batch.k.shape[-2]
    keep = torch.stack([keep * (1 + h % 2) for h in range(num_kv_heads)])
    compressed = assert_path_is_masked_attention(batch, keep, keep // 5 + 1, 3)
    counts = [[len(head) for head in heads] for heads in compressed.kept]
    assert counts == keep.T.tolist()


@pytest.mark.parametrize("case", IN_PLACE)
def test_decoding_where_it_lay_is_masked_attention(device: torch.device, case: str) -> None:
    batch, keep = made(case, device)
    compressed = assert_path_is_masked_attention(batch, keep, keep // 5 + 1, 3, in_place=True)
    assert compressed.k is batch.k
    assert [len(heads[0]) for heads in compressed.kept] == keep.tolist()


prompts = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 12), st.integers(0, 50), st.integers(0, 50)),
    min_size=1,
    max_size=3,
)


@settings(derandomize=True, max_examples=12, deadline=None)
@given(
    prompts,
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([None, 1, 7]),
    st.sampled_from([HALF, FLOAT]),
    st.integers(0, 99),
)
def test_any_budgets(pairs, num_kv_heads, group, new, page_size, dtype, seed: int) -> None:
    """Of each sequence and head, from nothing to everything, from no query rows on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths, rows, keeps, recents = map(list, zip(*pairs, strict=True))
    batch = random_varlen(
        [min(a, b) for a, b in zip(rows, lengths, strict=True)],
        lengths,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        d=16,
        dtype=dtype,
        device=device,
        page_size=page_size,
        seed=seed,
    )
    keep = torch.stack([integers(keeps, device), integers(keeps[::-1], device)])[:num_kv_heads]
    recent = integers(recents, device).expand(num_kv_heads, -1).contiguous()
    compressed = assert_path_is_masked_attention(batch, keep, recent, new)
    for i, n in enumerate(lengths):
        for h in range(num_kv_heads):
            kept, budget = compressed.kept[i][h].tolist(), min(int(keep[h, i]), n)
            assert len(kept) == budget
            assert kept[budget - min(recents[i], budget) :] == [
                *range(n - min(recents[i], budget), n)
            ]


def test_the_kept_tokens_are_those_that_the_query_rows_look_at(device: torch.device) -> None:
    """Three tokens whose keys the query rows share, far from the end: found, kept, attended to."""
    batch = random_varlen([9], [400], **HEADS, device=device)
    wanted = [7, 130, 301]
    batch.q.fill_(1.0)
    batch.k[wanted] = 1.0
    compressed = compress_by_head(
        batch, integers([[4], [4]], device), integers([[1], [1]], device), 1
    )
    assert [x.tolist() for x in compressed.kept[0]] == [[*wanted, 399]] * 2
    step = Step(batch.q[:1], *(x[:0].view(1, 0, *x.shape[1:]) for x in (batch.k, batch.v)))
    expected = batch.v[wanted].float().mean(0).repeat_interleave(3, 0)[None]
    torch.testing.assert_close(decode(compressed, step).float(), expected, atol=1e-2, rtol=1e-2)


def test_keeping_everything_is_the_full_cache(device: torch.device) -> None:
    """Bit for bit, in the ragged layout as in place, and as if never compressed."""
    shapes: dict[str, Any] = dict(lengths_q=[5, 3], lengths_k=[300, 63], **HEADS)
    batch = random_varlen(**shapes, device=device)
    step = make_step(batch, 1, 0)
    used = batch.cu_seqlens_k.diff()
    whole = Compressed(batch.k, batch.v, batch.cu_seqlens_k, used, None, [])
    expected = decode(whole, step)
    everything = integers([[MANY, MANY]] * 2, device)
    ragged = compress_by_head(batch, everything, everything, 0)
    assert ragged.seqused_k.tolist() == [300, 300, 63, 63]
    assert_identical([decode(ragged, step)], [expected])
    before = batch.k.clone(), batch.v.clone()
    in_place = compress_in_place(batch, everything[0], everything[0])
    assert_identical([batch.k, batch.v], before)
    assert_identical([decode(in_place, step)], [expected])


@settings(derandomize=True, max_examples=5, deadline=None)
@given(prompts, st.integers(0, 99))
def test_a_batch_equals_its_sequences(pairs, seed: int) -> None:
    """Bit for bit: what is kept, what is stored, what is decoded."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths, rows, keeps, recents = map(list, zip(*pairs, strict=True))
    rows = [min(a, b) for a, b in zip(rows, lengths, strict=True)]
    batch = random_varlen(rows, lengths, **HEADS, device=device, seed=seed)
    keep, recent = (integers([x, x], device) for x in (keeps, recents))  # the same for both heads
    step = make_step(batch, 2, 2)
    together = compress_by_head(batch, keep, recent, 2)
    out = decode(together, step)
    starts = together.cu_seqlens_k.tolist()
    for i in range(len(lengths)):
        q = slice(*batch.cu_seqlens_q[i : i + 2].tolist())
        k = slice(*batch.cu_seqlens_k[i : i + 2].tolist())
        single = Varlen(
            batch.q[q],
            batch.k[k],
            batch.v[k],
            cumulative([rows[i]], device),
            cumulative([lengths[i]], device),
            rows[i],
            lengths[i],
            None,
            None,
        )
        alone = compress_by_head(single, *(x[:, i : i + 1].contiguous() for x in (keep, recent)), 2)
        assert_identical(alone.kept[0], together.kept[i])
        one = Step(step.q[2 * i : 2 * i + 2], step.k[i : i + 1], step.v[i : i + 1])
        assert_identical([decode(alone, one)], [out[2 * i : 2 * i + 2]])
        pool = slice(starts[2 * i], starts[2 * i + 2])
        assert_identical([alone.k, alone.v], [together.k[pool], together.v[pool]])
