"""VLCACHE_PACK=0: sparse decoding where nothing is moved. Lists of what to read, made each step.

Each KV head of a request is one varlen sequence over the pool seen as `[slots * num_kv_heads]`
rows, as heads keep different tokens. The tables are built by the host, so a step cannot be
captured in a CUDA graph; slots are looked up by position, as the radix tree may exchange them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlcache_triton.recipe.plan import CompressionPlan


class KeptPositions:
    """The kept positions of one prompt, number `seq` of its plan, layer by layer.

    length: m. by_layer: `[num_kv_heads, k_l]` int32 each, ascending.
    """

    def __init__(self, length: int, plan: CompressionPlan, seq: int) -> None:
        self.length = length
        self.by_layer = [plan.kept_positions(layer, seq) for layer in range(len(plan.keep))]


def sparse_table(
    layer: int,
    kept: Sequence[KeptPositions | None],
    rows: Sequence[Tensor],
    seq_lens: Sequence[int],
    num_kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """(block_table `[num_seqs * num_kv_heads, max_len]`, seqused_k), int32, of one layer.

    Args:
        kept: for each request, what its prompt keeps; None where all is kept.
        rows: each request's slots by position, a row of req_to_token.
        seq_lens: tokens of each request, evicted ones included.
    """
    parts, lengths = [], []
    for prompt, row, seq_len in zip(kept, rows, seq_lens, strict=True):
        start = 0 if prompt is None else prompt.length
        slots = row[start:seq_len].expand(num_kv_heads, -1)
        if prompt is not None:
            slots = torch.cat([row[prompt.by_layer[layer].long()], slots], 1)
        parts.append(slots.T)
        lengths += [slots.shape[1]] * num_kv_heads
    heads = torch.arange(num_kv_heads, dtype=torch.int32, device=rows[0].device)
    table = pad_sequence(parts, batch_first=True) * num_kv_heads + heads  # [num_seqs, len, heads]
    table = table.transpose(1, 2).flatten(0, 1).contiguous()
    return table, torch.tensor(lengths, dtype=torch.int32, device=table.device)
