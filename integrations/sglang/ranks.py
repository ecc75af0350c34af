"""Tensor parallelism: what the heads of a layer say together, though each rank has some of them.

Ranks pack their own memory, and a prompt takes as many slots on each, whatever its layers keep. But
layers share the budget by what all their query heads say, and a KV head that several ranks hold, as
there are fewer of them than ranks, is attended by the query heads of all of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from vlcache_triton.kernels.types import PostVisionStats
from vlcache_triton.recipe.config import VLCacheConfig
from vlcache_triton.recipe.plan import layer_scores
from vlcache_triton.recipe.prompt import Prompt


@dataclass(frozen=True)
class Ranks:
    """This rank among those that share the heads of each layer out in order.

    num_kv_heads: of the whole model; where ranks outnumber them, consecutive ranks hold the same.
    group: torch's process group of the ranks.
    """

    size: int = 1
    rank: int = 0
    num_kv_heads: int = 1
    group: Any = None

    def retained(self, retained: Tensor) -> tuple[Tensor, int]:
        """(retained entries `[...]` of all query heads, how many these are), of this rank's `[...,
        num_heads]`."""
        total = retained.sum(-1)
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        return total, self.size * retained.shape[-1]

    def layer_scores(self, scores: Tensor, prompt: Prompt, config: VLCacheConfig) -> Tensor:
        """plan.layer_scores of this rank's heads `[num_layers, num_kv_heads, total_k]`, from the
        scores that their query heads on this rank gave."""
        local = scores.shape[1]
        own = slice(None)
        if self.size > 1 and (config.granularity == "layer" or self.size > self.num_kv_heads):
            first = self.rank * self.num_kv_heads // self.size
            own = slice(first, first + local)
            whole = scores.new_zeros(len(scores), self.num_kv_heads, scores.shape[2])
            if config.group_reduction == "mean":  # each rank's is over its part of the group
                whole[:, own] = scores / max(self.size // self.num_kv_heads, 1)
                dist.all_reduce(whole, group=self.group)
            else:
                whole[:, own] = scores
                dist.all_reduce(whole, dist.ReduceOp.MAX, group=self.group)
            scores = whole
        unused = scores.new_empty(0)
        return layer_scores(PostVisionStats(scores, unused, unused), prompt, config)[:, own]
