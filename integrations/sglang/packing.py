"""Move what a prompt keeps into the cells of its first slots, all layers together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlcache_triton.backend import Backend
from vlcache_triton.plan import CompressionPlan

from .block_table import PackedLayout, cells
from .prompts import TrackedPrompt

if TYPE_CHECKING:
    from .pool import OneTensorKVPool


def pack_prompt(
    prompt: TrackedPrompt,
    plan: CompressionPlan,
    pool: OneTensorKVPool,
    slots: Tensor,
    layout: PackedLayout,
    backend: Backend,
) -> None:
    """Gather the kept rows of every layer, then scatter them into the prompt's first slots.

    Cells of one layer may lie where another layer's kept rows still are, so all are gathered first:
    the peak is the compressed prompt, once more.

    Args:
        slots: `[m]` int32, the prompt's slots in order of position.
        layout: told of it, for the decode steps to come.
    """
    kept = plan.keep[:, 0].tolist()
    gathered = [
        _gather_layer(layer, k_l, plan, pool, slots, backend) for layer, k_l in enumerate(kept)
    ]
    own = slots[prompt.protected : prompt.protected + prompt.num_slots].long()
    first_cell = 0
    for k_l, (k, v) in zip(kept, gathered, strict=True):
        rows = cells(first_cell, k_l, own, len(kept), pool.num_rows)
        pool.flat.index_copy_(0, rows, k)
        pool.flat.index_copy_(0, rows + pool.num_rows, v)
        first_cell += k_l
    layout.set(prompt.req_pool_idx, prompt.length, prompt.protected, kept)
    prompt.is_packed = True


def _gather_layer(
    layer: int,
    kept: int,
    plan: CompressionPlan,
    pool: OneTensorKVPool,
    slots: Tensor,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """This layer's kept K and V, `[kept, num_kv_heads, d]`: row j has each head's own token j."""
    k, v = pool.k_buffer[layer], pool.v_buffer[layer]
    num_kv_heads, d = k.shape[1:]
    starts = torch.arange(num_kv_heads + 1, dtype=torch.int32, device=k.device) * kept
    out_k, out_v = (x.new_empty(num_kv_heads * kept, 1, d) for x in (k, v))
    backend.compact_kv(
        k[:, None],
        v[:, None],
        starts[:2],  # unused for pages
        plan.indices,
        plan.layer_cu_kept(layer),
        out_k,
        out_v,
        starts,
        max_kept=kept,
        block_table=slots[None],
    )
    shape = num_kv_heads, kept, d
    return out_k.view(shape).transpose(0, 1), out_v.view(shape).transpose(0, 1)
