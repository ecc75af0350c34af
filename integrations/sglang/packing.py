"""Move what prompts keep into the cells of their first slots, all layers and prompts together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcache_triton.kernels.launch import to_device
from vlcache_triton.ops import Backend
from vlcache_triton.recipe.plan import CompressionPlan

from .block_table import PackedLayout, cell_rows
from .prompts import TrackedPrompt

if TYPE_CHECKING:
    from .pool import OneTensorKVPool


def pack_prompts(
    prompts: Sequence[TrackedPrompt],
    plan: CompressionPlan,
    pool: OneTensorKVPool,
    req_to_token: Tensor,
    layout: PackedLayout,
    backend: Backend,
) -> None:
    """Gather the kept rows of every layer, then scatter them into the prompts' first slots.

    Cells of one layer may lie where another layer's kept rows still are, so all are gathered first:
    the peak is the compressed prompts, once more. `compact_kv_`, which needs no second copy, moves
    rows to the front of their own layer and sequence: but cells are lent to other layers, and where
    a prefix was found in the radix tree the front is the tree's, which must not be written.

    No sync; some twenty launches, however many layers and prompts.

    Args:
        plan: of these prompts, in order.
        req_to_token: `[*, max_context]` int32, SGLang's slots of each request.
        layout: told of it, for the decode steps to come.
    """
    keep, device = plan.keep, req_to_token.device
    facts = to_device(layout.facts(prompts, plan), device)
    num_layers, num_kv_heads = len(keep), plan.num_kv_heads
    rows, first_slot, first_cell = facts[0], facts[2], facts[3 : num_layers + 3]
    slots = req_to_token[rows, : plan.prompt.padded_length]
    # Where each segment, which is one (layer, prompt, KV head), starts among the gathered rows.
    starts = F.pad(plan.head_keep.flatten().cumsum(0), (1, 0))
    total, starts = int(starts[-1]), to_device(starts.int(), device)
    k, v = _gather(plan, pool, slots, starts, total, backend)

    # Of each gathered row: its segment, and then its cell.
    segments = torch.arange(plan.head_keep.numel(), device=device)
    segment = segments.repeat_interleave(starts.diff(), output_size=total)
    head, sequence = segment % num_kv_heads, segment // num_kv_heads
    entry = torch.arange(total, device=device) - starts[segment]
    cell = first_cell.reshape(-1)[sequence] + entry
    seq = sequence % len(prompts)
    slot = slots[seq, first_slot[seq] + cell // num_layers]
    row = cell_rows(cell, slot, num_layers, pool.num_rows)
    pool.flat[row, head] = k
    pool.flat[row + pool.num_rows, head] = v

    layout.table[:, rows] = facts[1:]
    most_kept = keep.amax(0).tolist()
    for prompt, most in zip(prompts, most_kept, strict=True):
        prompt.is_packed, prompt.evicted = True, prompt.length - most


def _gather(
    plan: CompressionPlan,
    pool: OneTensorKVPool,
    slots: Tensor,
    starts: Tensor,
    total: int,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """K and V `[total, d]` of the rows to keep, segment by segment: the one that stands for what
    is evicted, where there is one, and then the tokens in the order of the plan's indices.

    To the kernels, each layer of each prompt is a sequence of its own over the flat pool.
    """
    num_layers = len(plan.head_keep)
    layer_rows = torch.arange(num_layers, device=slots.device, dtype=torch.int32)
    block_table = (slots + (2 * pool.num_rows * layer_rows)[:, None, None]).flatten(0, 1)
    source = (
        pool.flat[: -pool.num_rows, None],
        pool.flat[pool.num_rows :, None],
        plan.cu_kept,  # unused for pages
        plan.indices,
        plan.cu_kept,
    )
    out_k, out_v = pool.flat.new_empty(2, total, 1, pool.flat.shape[-1])
    first_tokens = starts
    if plan.evicted is not None:
        lengths = to_device(torch.tensor(plan.prompt.lengths).int(), slots.device)
        sums = backend.sum_evicted(
            *source,
            plan.prompt.padded_length,
            seqused_k=lengths.repeat(num_layers),
            block_table=block_table,
        )
        evicted = to_device(plan.evicted.flatten().int(), slots.device)
        backend.store_means(*sums, evicted, out_k, out_v, starts)
        first_tokens = starts.clone()
        first_tokens[:-1] += evicted > 0
    backend.compact_kv(
        *source,
        out_k,
        out_v,
        first_tokens,
        max_kept=int(plan.head_keep.max()),
        block_table=block_table,
    )
    return out_k[:, 0], out_v[:, 0]
