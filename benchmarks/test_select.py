"""select_tokens for all 32 layers of a 7B model in one launch, against torch.topk."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from measure import DEVICE, HAS_GPU, num_copies
from torch import Tensor

from vlcache_triton.kernels import reference
from vlcache_triton.kernels.select import Selection, select_tokens

NUM_LAYERS, NUM_KV_HEADS = (32, 8) if HAS_GPU else (3, 2)
SHAPES = [(1, 2048), (1, 8192), (1, 32768), (1, 131072), (16, 8192)] if HAS_GPU else [(2, 60)]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, int, int]


@functools.lru_cache(maxsize=1)
def case(num_seqs: int, length: int) -> tuple[list[Inputs], Selection]:
    """Rotating inputs, a tenth kept on average, and the reference's selection of the first."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    # Layers keep from 0.02 to 0.18 of the prompt.
    shares = torch.linspace(0.02, 0.18, NUM_LAYERS, device=DEVICE)
    keep = (shares * length).int().clamp(min=1)[:, None].repeat(1, num_seqs)
    total = int(keep.sum()) * NUM_KV_HEADS
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE) * length

    def make() -> Inputs:
        scores = torch.rand(
            NUM_LAYERS, NUM_KV_HEADS, num_seqs * length, generator=generator, device=DEVICE
        )
        return scores, starts, keep, keep // 10, length, total

    inputs = [make() for _ in range(num_copies(NUM_LAYERS * NUM_KV_HEADS * num_seqs * length * 4))]
    *args, max_seqlen, total_kept = inputs[0]
    expected = reference.select_tokens(*args, max_seqlen=max_seqlen, total_kept=total_kept)
    return inputs, expected


def ours(x: Inputs) -> Callable[[], Selection]:
    """The radix selection."""
    *args, max_seqlen, total_kept = x
    return lambda: select_tokens(*args, max_seqlen=max_seqlen, total_kept=total_kept)


def topk_and_sort(x: Inputs) -> Callable[[], Selection]:
    """torch.topk and a sort for each layer, k known to the host; for one sequence only."""
    scores, _, keep, recent, length, _ = x
    counts = list(zip(keep[:, 0].tolist(), recent[:, 0].tolist(), strict=True))
    sizes = keep.repeat_interleave(NUM_KV_HEADS)
    cu_kept = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int()

    def run() -> Selection:
        kept = []
        for layer, (k, window) in enumerate(counts):
            top = scores[layer, :, : length - window].topk(k - window).indices.sort().values
            last = torch.arange(length - window, length, device=scores.device)
            kept.append(torch.cat([top, last.expand(NUM_KV_HEADS, -1)], 1).flatten())
        return Selection(torch.cat(kept).int(), cu_kept)

    return run


@pytest.mark.parametrize("peer", [ours, topk_and_sort])
@pytest.mark.parametrize(("num_seqs", "length"), SHAPES)
def test_select(measure, num_seqs, length, peer):
    if peer is topk_and_sort and num_seqs > 1:
        pytest.skip("topk_and_sort takes one sequence")
    inputs, expected = case(num_seqs, length)
    launches = [peer(x) for x in inputs]
    selection = launches[0]()
    assert torch.equal(selection.cu_kept, expected.cu_kept)
    if peer is ours:
        assert torch.equal(selection.indices, expected.indices)
    else:  # ties among 32-bit random numbers may fall otherwise
        assert (selection.indices == expected.indices).float().mean() > 0.99
    measure(
        launches,
        nbytes=inputs[0][0].nbytes + expected.indices.nbytes,
        num_seqs=num_seqs,
        length=length,
        num_layers=NUM_LAYERS,
        peer=peer.__name__,
    )


def even(x: Inputs) -> Inputs:
    """The same scores; every head of every layer keeps a tenth, by its score alone."""
    scores, starts, keep, _, length, _ = x
    keep = torch.full_like(keep, max(length // 10, 1))
    total = int(keep.sum()) * NUM_KV_HEADS
    return scores, starts, keep, torch.zeros_like(keep), length, total


def topk(x: Inputs) -> Callable[[], Tensor]:
    """torch.topk of all segments at once, which puts out scores and unordered positions."""
    scores, _, keep, _, length, _ = x
    count = int(keep[0, 0])
    return lambda: scores.view(-1, length).topk(count, sorted=False).indices


@pytest.mark.parametrize("peer", [ours, topk])
@pytest.mark.parametrize("length", sorted({length for n, length in SHAPES if n == SHAPES[0][0]}))
def test_select_even(measure, length, peer):
    """32 layers of 8 heads are 256 segments; one launch by either."""
    inputs = [even(x) for x in case(1, length)[0]]
    launches = [peer(x) for x in inputs]
    *args, _, total = inputs[0]
    expected = reference.select_tokens(*args, max_seqlen=length, total_kept=total).indices
    if peer is ours:
        assert torch.equal(launches[0]().indices, expected)
    else:
        actual = launches[0]().sort(-1).values.flatten()
        assert (actual == expected).float().mean() > 0.99
    measure(
        launches,
        nbytes=inputs[0][0].nbytes + expected.nbytes,
        length=length,
        num_layers=NUM_LAYERS,
        peer=peer.__name__,
    )
