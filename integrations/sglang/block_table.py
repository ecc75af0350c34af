"""Where each request's live tokens lie in the one-tensor pool: one layer's block table, in a step.

The kept tokens of a packed prompt fill the cells of its first slots in a fixed order, so their
addresses follow from three numbers of the request and need no index lists: kept token j of layer l
is cell c = Σ_{i<l} k_i + j, and cell c lies in layer c % L of the prompt's own slot c // L.
Everything is read on the device, so that a captured decode step stays right as requests come, grow
and go; what is written follows the live lengths, not the capacities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .prompts import TrackedPrompt

BLOCK = 256  # entries of the table that a program writes at a time
PROGRAMS = 8  # of a request: they share its live entries out, so a wide table costs no more


@dataclass(frozen=True)
class PackedLayout:
    """Of each row of req_to_token, how its prompt is packed. Zeros where it is not.

    table: `[num_layers + 3, num_rows]` int32, of which the others are views.
    prompt_end: `[num_rows]`, m: slots from here on hold one token each, as SGLang has them.
    first_slot: `[num_rows]`, position in the row of the first of the prompt's slots.
    first_cell: `[num_layers + 1, num_rows]`, Σ_{i<l} k_i.
    """

    table: Tensor

    @classmethod
    def empty(cls, num_layers: int, num_rows: int, device: torch.device) -> PackedLayout:
        """Nothing is packed."""
        return cls(torch.zeros(num_layers + 3, num_rows, dtype=torch.int32, device=device))

    @property
    def prompt_end(self) -> Tensor:
        return self.table[0]

    @property
    def first_slot(self) -> Tensor:
        return self.table[1]

    @property
    def first_cell(self) -> Tensor:
        return self.table[2:]

    def reset(self, rows: Tensor) -> None:
        """These rows were given to new requests."""
        self.table[:, rows] = 0

    @staticmethod
    def facts(prompts: Sequence[TrackedPrompt], keep: Tensor) -> Tensor:
        """`[num_layers + 4, num_prompts]` int32 on the host: the prompts' rows of req_to_token, and
        then the columns of `table` that they get, keeping `keep[l, i]` tokens of layer l."""
        own = torch.tensor([(p.req_pool_idx, p.length, p.protected) for p in prompts]).T
        return torch.cat([own, torch.zeros_like(own[:1]), keep.cumsum(0)]).int()


def cell_rows(cell: Tensor, slot: Tensor, num_layers: int, num_rows: int) -> Tensor:
    """Rows of the pool's flat view, for K, that cells are. slot: the slot each lies in."""
    return 2 * (cell % num_layers) * num_rows + slot


def fill_block_table(
    layer: int,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    layout: PackedLayout,
    num_rows: int,
    block_table: Tensor,
    seqused_k: Tensor,
) -> None:
    """Write one layer's table. No sync, no allocation.

    Args:
        req_to_token: `[*, max_context]` int32, SGLang's slots of each request.
        req_pool_indices: `[num_seqs]` the rows of req_to_token. seq_lens: `[num_seqs]`, tokens of
            each request, evicted ones included.
        num_rows: slots of the pool, padding included.
        block_table: `[num_seqs, max_blocks]` int32, out: rows of the flat view, for K; entries
            behind a request's last are left as they are.
        seqused_k: `[num_seqs]` int32, out: live tokens.
    """
    num_seqs, max_blocks = block_table.shape
    num_layers = layout.first_cell.shape[0] - 1
    with torch.cuda.device_of(block_table):
        _block_table_kernel[(num_seqs, min(triton.cdiv(max_blocks, BLOCK), PROGRAMS))](
            req_to_token,
            req_pool_indices,
            seq_lens,
            layout.prompt_end,
            layout.first_slot,
            layout.first_cell,
            block_table,
            seqused_k,
            layer,
            num_layers,
            num_rows,
            max_blocks,
            req_to_token.stride(0),
            layout.first_cell.stride(0),
            BLOCK=BLOCK,
        )


@triton.jit
def _block_table_kernel(
    req_to_token_ptr,
    req_pool_indices_ptr,
    seq_lens_ptr,
    prompt_end_ptr,
    first_slot_ptr,
    first_cell_ptr,
    block_table_ptr,
    seqused_k_ptr,
    layer,
    num_layers,
    num_rows,
    max_blocks,
    stride_req,
    stride_layer,
    BLOCK: tl.constexpr,
):
    seq, block = tl.program_id(0), tl.program_id(1)
    row = tl.load(req_pool_indices_ptr + seq).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)
    prompt_end = tl.load(prompt_end_ptr + row)
    first_slot = tl.load(first_slot_ptr + row)
    first_cell = tl.load(first_cell_ptr + layer * stride_layer + row)
    kept = tl.load(first_cell_ptr + (layer + 1) * stride_layer + row) - first_cell
    # A graph's padding rows name any request with a length of their own: never below nothing.
    length = tl.minimum(tl.maximum(seq_len - prompt_end + kept, 0), max_blocks)
    if block == 0:
        tl.store(seqused_k_ptr + seq, length)
    target_ptr = block_table_ptr + seq.to(tl.int64) * max_blocks
    for start in range(block * BLOCK, length, tl.num_programs(1) * BLOCK):
        entry = start + tl.arange(0, BLOCK)
        mask = entry < length
        cell = first_cell + entry
        is_kept = entry < kept
        position = tl.where(is_kept, first_slot + cell // num_layers, prompt_end + entry - kept)
        home = tl.where(is_kept, cell % num_layers, layer)
        slot = tl.load(req_to_token_ptr + row * stride_req + position, mask=mask, other=0)
        tl.store(target_ptr + entry, 2 * home * num_rows + slot, mask=mask)
