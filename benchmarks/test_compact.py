"""Compaction of all 32 layers of a 7B model, alone and behind the selection."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from measure import DEVICE, DTYPE, HAS_GPU
from torch import Tensor

from vlcache_triton.kernels import reference
from vlcache_triton.kernels.compact import compact_kv, compact_kv_
from vlcache_triton.kernels.remainder import store_means, sum_evicted
from vlcache_triton.kernels.select import Selection, select_tokens

NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE = (32, 8, 128) if HAS_GPU else (3, 2, 16)
LENGTHS = [2048, 8192, 32768, 131072] if HAS_GPU else [50]
HEAD_ROOM = 128 if HAS_GPU else 3


class Case(NamedTuple):
    """A prompt's dense layers, and the pools that take a tenth of it."""

    k: list[Tensor]
    v: list[Tensor]
    scores: Tensor
    starts: Tensor  # of the one sequence
    keep: Tensor
    kept: list[int]  # the same, on the host
    pool_k: Tensor
    pool_v: Tensor
    pool_starts: Tensor  # [num_layers, num_kv_heads + 1]


@functools.lru_cache(maxsize=1)
def case(length: int) -> Case:
    """At 2K, K and V of 32 layers are 268 MB already: no layer is in the L2 cache."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def rows(num: int) -> Tensor:
        shape = (num, NUM_KV_HEADS, HEAD_SIZE)
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=DTYPE)

    shares = torch.linspace(0.02, 0.18, NUM_LAYERS)
    kept = (shares * length).int().clamp(min=2).tolist()
    capacity = torch.tensor(kept).repeat_interleave(NUM_KV_HEADS) + HEAD_ROOM
    starts = torch.cat([capacity.new_zeros(1), capacity.cumsum(0)])
    first = torch.arange(NUM_LAYERS)[:, None] * NUM_KV_HEADS + torch.arange(NUM_KV_HEADS + 1)
    pool = torch.empty(int(starts[-1]), 1, HEAD_SIZE, device=DEVICE, dtype=DTYPE)
    return Case(
        k=[rows(length) for _ in range(NUM_LAYERS)],
        v=[rows(length) for _ in range(NUM_LAYERS)],
        scores=torch.rand(NUM_LAYERS, NUM_KV_HEADS, length, generator=generator, device=DEVICE),
        starts=torch.tensor([0, length], dtype=torch.int32, device=DEVICE),
        keep=torch.tensor(kept, dtype=torch.int32, device=DEVICE)[:, None],
        kept=kept,
        pool_k=pool,
        pool_v=torch.empty_like(pool),
        pool_starts=starts[first].int().to(DEVICE),
    )


def select(x: Case) -> Selection:
    """Which tokens stay, for all layers."""
    total = sum(x.kept) * NUM_KV_HEADS
    return select_tokens(
        x.scores, x.starts, x.keep, x.keep // 10, max_seqlen=x.scores.shape[-1], total_kept=total
    )


def compact(x: Case, selection: Selection, in_place: bool) -> None:
    """Every layer, one launch each."""
    for layer, max_kept in enumerate(x.kept):
        first = layer * NUM_KV_HEADS
        cu_kept = selection.cu_kept[first : first + NUM_KV_HEADS + 1]
        source = (x.k[layer], x.v[layer], x.starts, selection.indices, cu_kept)
        if in_place:
            compact_kv_(*source, max_kept=max_kept)
        else:
            pools = (x.pool_k, x.pool_v, x.pool_starts[layer])
            compact_kv(*source, *pools, max_kept=max_kept)


def check_layer(x: Case, selection: Selection, layer: int, in_place: bool) -> None:
    """Compaction is exact: bit for bit what the reference moves."""
    first = layer * NUM_KV_HEADS
    cu_kept = selection.cu_kept[first : first + NUM_KV_HEADS + 1]
    pools = torch.empty_like(x.pool_k), torch.empty_like(x.pool_v)
    starts, kept = x.pool_starts[layer], x.kept[layer]
    source = (x.k[layer], x.v[layer], x.starts, selection.indices, cu_kept)
    reference.compact_kv(*source, *pools, starts, max_kept=kept)
    if in_place:
        k, v = x.k[layer].clone(), x.v[layer].clone()
        compact_kv_(k, v, *source[2:], max_kept=kept)
        actual = [[k[:kept, head], v[:kept, head]] for head in range(NUM_KV_HEADS)]
    else:
        compact(x, selection, in_place=False)
        actual = [[p[s : s + kept, 0] for p in (x.pool_k, x.pool_v)] for s in starts[:-1].tolist()]
    for start, rows in zip(starts[:-1].tolist(), actual, strict=True):
        for pool, row in zip(pools, rows, strict=True):
            assert torch.equal(pool[start : start + kept, 0], row)


def summarise(x: Case, selection: Selection) -> None:
    """A row for what every layer evicts: two launches each."""
    for layer in range(NUM_LAYERS):
        first, length = layer * NUM_KV_HEADS, len(x.k[layer])
        cu_kept = selection.cu_kept[first : first + NUM_KV_HEADS + 1]
        counts = torch.full_like(cu_kept[1:], length - x.kept[layer])
        source = (x.k[layer], x.v[layer], x.starts, selection.indices, cu_kept, length)
        store_means(*sum_evicted(*source), counts, x.pool_k, x.pool_v, x.pool_starts[layer])


@pytest.mark.parametrize("length", LENGTHS)
def test_remainder(measure, length):
    x = case(length)
    selection = select(x)
    summarise(x, selection)
    for layer in (0, NUM_LAYERS - 1):
        rows = x.pool_starts[layer, :-1].long()
        for head, row in enumerate(rows.tolist()):
            first = int(selection.cu_kept[layer * NUM_KV_HEADS + head])
            evicted = torch.ones(length, dtype=torch.bool, device=DEVICE)
            evicted[selection.indices[first : first + x.kept[layer]].long()] = False
            for source, pool in ((x.k[layer], x.pool_k), (x.v[layer], x.pool_v)):
                mean = source[evicted, head].float().mean(0)
                torch.testing.assert_close(pool[row, 0].float(), mean, rtol=1e-2, atol=1e-3)
    evicted_rows = sum(length - n for n in x.kept) * NUM_KV_HEADS
    nbytes = 2 * evicted_rows * HEAD_SIZE * DTYPE.itemsize  # K and V, read
    run = functools.partial(summarise, x, selection)
    measure([run], nbytes=nbytes, length=length, num_layers=NUM_LAYERS, peer="remainder")


@pytest.mark.parametrize("step", ["compact", "compact_in_place", "select_and_compact"])
@pytest.mark.parametrize("length", LENGTHS)
def test_compact(measure, length, step):
    x = case(length)
    selection, in_place = select(x), step == "compact_in_place"
    for layer in (0, NUM_LAYERS - 1):
        check_layer(x, selection, layer, in_place)
    moved = 4 * sum(x.kept) * NUM_KV_HEADS * HEAD_SIZE * DTYPE.itemsize  # K, V; read, written
    if step == "select_and_compact":
        run = functools.partial(lambda: compact(x, select(x), in_place))
        moved += x.scores.nbytes
    else:
        run = functools.partial(compact, x, selection, in_place)
    measure([run], nbytes=moved, length=length, num_layers=NUM_LAYERS, peer=step)
