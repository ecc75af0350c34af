"""What ranks agree on: threads stand in for them, and add up by themselves."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch.distributed import ReduceOp

from vlcache_triton.integrations.sglang import ranks as ranks_module
from vlcache_triton.integrations.sglang.measure import plan_prompts
from vlcache_triton.integrations.sglang.prompts import ChunkStats, TrackedPrompt
from vlcache_triton.integrations.sglang.ranks import Ranks
from vlcache_triton.kernels.reference import post_vision_stats
from vlcache_triton.ops import get_backend
from vlcache_triton.recipe.config import VLCacheConfig

LAYERS, HEADS, D = 3, 8, 16
LENGTHS, ROWS = (40, 61), 9


class Group:
    """Sums or maxima over threads, as an all-reduce over processes."""

    def __init__(self, size: int) -> None:
        self.barrier, self.tensors = Barrier(size, timeout=60), {}

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp, rank: int) -> None:
        self.tensors[rank] = tensor.clone()
        self.barrier.wait()
        every = torch.stack([self.tensors[i] for i in sorted(self.tensors)])
        tensor.copy_(every.sum(0) if op == ReduceOp.SUM else every.amax(0))
        self.barrier.wait()


def prompts_of(q, k, heads: slice, kv_heads: slice, config: VLCacheConfig) -> list[TrackedPrompt]:
    """Two prompts, measured by some of their heads."""
    prompts = []
    for i, length in enumerate(LENGTHS):
        cu_q = torch.tensor([0, ROWS], dtype=torch.int32)
        cu_k = torch.tensor([0, length], dtype=torch.int32)
        reductions = dict(
            row_reduction=config.row_reduction, group_reduction=config.group_reduction
        )
        stats = [
            post_vision_stats(
                q[i][layer][:, heads],
                k[i][layer][:, kv_heads],
                cu_q,
                cu_k,
                ROWS,
                length,
                **reductions,
            )
            for layer in range(LAYERS)
        ]
        stats = ChunkStats(
            torch.stack([s.scores for s in stats]), torch.cat([s.retained for s in stats])
        )
        prompts.append(TrackedPrompt(str(i), i, length, length - ROWS, 0, stats=stats))
    return prompts


@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
@pytest.mark.parametrize("make_config", [VLCacheConfig, VLCacheConfig.tuned])
@pytest.mark.parametrize("size, num_kv_heads", [(2, 4), (4, 4), (4, 2), (8, 1)])
def test_ranks_keep_what_one_rank_keeps(monkeypatch, size, num_kv_heads, make_config, granularity):
    generator = torch.Generator().manual_seed(size)
    q = [3 * torch.randn(LAYERS, ROWS, HEADS, D, generator=generator) for _ in LENGTHS]
    k = [torch.randn(LAYERS, n, num_kv_heads, D, generator=generator) for n in LENGTHS]
    config = make_config(budget=0.3, granularity=granularity, smoothing=3)
    ops = get_backend("reference", torch.device("cpu"))
    every = slice(None)
    alone = plan_prompts(prompts_of(q, k, every, every, config), config, Ranks(), ops)

    group = Group(size)

    def all_reduce(x, op=ReduceOp.SUM, group=None):
        group[0].all_reduce(x, op, group[1])

    monkeypatch.setattr(ranks_module.dist, "all_reduce", all_reduce)

    def plan(rank: int):
        heads = slice(rank * HEADS // size, (rank + 1) * HEADS // size)
        first = rank * num_kv_heads // size
        own = slice(first, first + max(num_kv_heads // size, 1))
        ranks = Ranks(size, rank, num_kv_heads, (group, rank))
        return own, plan_prompts(prompts_of(q, k, heads, own, config), config, ranks, ops)

    with ThreadPoolExecutor(size) as pool:
        plans = list(pool.map(plan, range(size)))
    assert alone.keep.unique().numel() > 1
    for own, ours in plans:
        assert torch.equal(ours.keep, alone.keep)
        for layer in range(LAYERS):
            for seq in range(len(LENGTHS)):
                expected = alone.kept_positions(layer, seq)[own]
                assert torch.equal(ours.kept_positions(layer, seq), expected)
