"""Where each request's live tokens lie in the one-tensor pool: one layer's block table, in a step.

The kept tokens of a packed prompt fill the cells of its first slots in a fixed order, so their
addresses follow from three numbers of the request and need no index lists: kept token j of layer l
is cell c = Σ_{i<l} k_i + j, and cell c lies in layer c % L of the prompt's own slot c // L.
Everything is read on the device, and the grid depends on capacities alone, so that a captured
decode step stays right as requests come, grow and go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # entries of the table that a program writes


@dataclass(frozen=True)
class PackedLayout:
    """Of each row of req_to_token, how its prompt is packed. Zeros where it is not.

    prompt_end: `[num_rows]` int32, m: slots from here on hold one token each, as SGLang has them.
    first_slot: `[num_rows]` int32, position in the row of the first of the prompt's slots.
    first_cell: `[num_layers + 1, num_rows]` int32, Σ_{i<l} k_i.
    """

    prompt_end: Tensor
    first_slot: Tensor
    first_cell: Tensor

    @classmethod
    def empty(cls, num_layers: int, num_rows: int, device: torch.device) -> PackedLayout:
        """Nothing is packed."""
        table = torch.zeros(num_layers + 3, num_rows, dtype=torch.int32, device=device)
        return cls(table[0], table[1], table[2:])

    def reset(self, rows: Tensor) -> None:
        """These rows were given to new requests."""
        self.prompt_end[rows] = 0
        self.first_cell[:, rows] = 0

    def set(self, row: int, prompt_end: int, first_slot: int, kept: list[int]) -> None:
        """Row `row` holds a packed prompt that keeps `kept[l]` tokens of layer l."""
        device = self.prompt_end.device
        self.prompt_end[row] = prompt_end
        self.first_slot[row] = first_slot
        self.first_cell[1:, row] = torch.tensor(kept).cumsum(0).to(device, torch.int32)


def cells(first_cell: int, kept: int, slots: Tensor, num_layers: int, num_rows: int) -> Tensor:
    """`[kept]` int64: rows of the pool's flat view that cells first_cell, ... are, for K."""
    cell = torch.arange(first_cell, first_cell + kept, device=slots.device)
    return 2 * (cell % num_layers) * num_rows + slots[cell // num_layers]


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
        _block_table_kernel[(num_seqs, triton.cdiv(max_blocks, BLOCK))](
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
    if block * BLOCK < length:
        entry = block * BLOCK + tl.arange(0, BLOCK)
        mask = entry < length
        cell = first_cell + entry
        is_kept = entry < kept
        position = tl.where(is_kept, first_slot + cell // num_layers, prompt_end + entry - kept)
        home = tl.where(is_kept, cell % num_layers, layer)
        slot = tl.load(req_to_token_ptr + row * stride_req + position, mask=mask, other=0)
        target = block_table_ptr + seq.to(tl.int64) * max_blocks + entry
        tl.store(target, 2 * home * num_rows + slot, mask=mask)
