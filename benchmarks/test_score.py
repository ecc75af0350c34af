"""post_vision_stats of one layer, 50 query rows, against the time of reading K twice."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from measure import DEVICE, DTYPE, HAS_GPU, check, num_copies
from torch import Tensor

from vlcache_triton.kernels import reference
from vlcache_triton.kernels.score import PostVisionStats, post_vision_stats

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = (32, 8, 128) if HAS_GPU else (4, 2, 16)
NUM_ROWS = 50 if HAS_GPU else 5
SHAPES = [(1, 2048), (1, 8192), (1, 32768), (1, 131072), (16, 8192)] if HAS_GPU else [(2, 70)]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, int, int]


def k_bytes(num_seqs: int, length: int) -> int:
    """Bytes of K."""
    return num_seqs * length * NUM_KV_HEADS * HEAD_SIZE * DTYPE.itemsize


@functools.lru_cache(maxsize=1)
def case(num_seqs: int, length: int) -> tuple[list[Inputs], PostVisionStats]:
    """Rotating inputs, and the fp32 reference's statistics of the first."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def make() -> Inputs:
        q, k = (
            torch.randn(num_seqs * n, heads, HEAD_SIZE, generator=generator, device=DEVICE)
            for n, heads in ((NUM_ROWS, NUM_HEADS), (length, NUM_KV_HEADS))
        )
        starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE)
        return q.to(DTYPE), k.to(DTYPE), starts * NUM_ROWS, starts * length, NUM_ROWS, length

    inputs = [make() for _ in range(num_copies(k_bytes(num_seqs, length)))]
    q, k, *rest = inputs[0]
    return inputs, reference.post_vision_stats(q.float(), k.float(), *rest)


def ours(x: Inputs) -> Callable[[], PostVisionStats]:
    """The fused kernels."""
    return lambda: post_vision_stats(*x)


def plain_torch(x: Inputs) -> Callable[[], PostVisionStats]:
    """The same by torch operations in the inputs' dtype, with the attention matrix in memory."""
    q, k, _, _, num_rows, length = x
    num_seqs = len(k) // length

    def run() -> PostVisionStats:
        rows = q.view(num_seqs, num_rows, NUM_KV_HEADS, -1, HEAD_SIZE).permute(0, 2, 3, 1, 4)
        keys = k.view(num_seqs, length, NUM_KV_HEADS, HEAD_SIZE).permute(0, 2, 3, 1)
        logits = (rows @ keys[:, :, None]).float() * HEAD_SIZE**-0.5
        last = torch.arange(length - num_rows, length, device=q.device)
        hidden = torch.arange(length, device=q.device) > last[:, None]
        weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
        passes = (weights >= 0.01 * weights.amax(-1, keepdim=True)) & ~hidden
        scores = weights.sum(-2).mean(2).transpose(0, 1).flatten(1)
        visible = (~hidden).sum().expand(num_seqs)
        return PostVisionStats(scores, passes.sum((-1, -2)).flatten(1), visible)

    return run


@pytest.mark.parametrize("peer", [ours, plain_torch])
@pytest.mark.parametrize(("num_seqs", "length"), SHAPES)
def test_score(measure, num_seqs, length, peer):
    inputs, expected = case(num_seqs, length)
    launches = [peer(x) for x in inputs]
    stats = launches[0]()
    check(stats.scores, expected.scores)
    check(stats.retained, expected.retained)
    assert torch.equal(stats.visible, expected.visible)
    measure(
        launches,
        nbytes=2 * k_bytes(num_seqs, length),
        num_seqs=num_seqs,
        length=length,
        num_rows=NUM_ROWS,
        peer=peer.__name__,
    )
