"""Where each request's live tokens lie in the one-tensor pool: one layer's block table, in a step.

The kept tokens of a packed prompt fill the cells of its first slots in a fixed order, so their
addresses follow from three numbers of the request and need no index lists: kept row j of layer l
is cell c = Σ_{i<l} k_i + j, and cell c lies in layer c % L of the prompt's own slot c // L. The row
that stands for what a layer evicts, where there is one, is its row 0.
Everything is read on the device, so that a captured decode step stays right as requests come, grow
and go; what is written follows the live lengths, not the capacities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vlcache_triton.recipe.plan import CompressionPlan

from .prompts import TrackedPrompt

BLOCK = 256  # entries of the table that a program writes at a time
PROGRAMS = 8  # of a request: they share its live entries out, so a wide table costs no more


@dataclass(frozen=True)
class PackedLayout:
    """Of each row of req_to_token, how its prompt is packed. Zeros where it is not.

    table: `[2 * num_layers + 3, num_rows]` int32, one behind the other:
        prompt_end `[num_rows]`, m: slots from here on hold one token each, as SGLang has them;
        first_slot `[num_rows]`, position in the row of the first of the prompt's slots;
        first_cell `[num_layers + 1, num_rows]`, Σ_{i<l} k_i;
        first_key_bias `[num_layers, num_rows]`, the bits of fp32: log(n) where a layer's first row
        is the mean of n evicted ones, else 0.
    """

    table: Tensor

    @classmethod
    def empty(cls, num_layers: int, num_rows: int, device: torch.device) -> PackedLayout:
        """Nothing is packed."""
        return cls(torch.zeros(2 * num_layers + 3, num_rows, dtype=torch.int32, device=device))

    @property
    def num_layers(self) -> int:
        return (len(self.table) - 3) // 2

    def reset(self, rows: Tensor) -> None:
        """These rows were given to new requests."""
        self.table[:, rows] = 0

    @staticmethod
    def facts(prompts: Sequence[TrackedPrompt], plan: CompressionPlan) -> Tensor:
        """`[2 * num_layers + 4, num_prompts]` int32 on the host: the prompts' rows of req_to_token,
        and then the columns of `table` that they get."""
        own = torch.tensor([(p.req_pool_idx, p.length, p.protected) for p in prompts]).T
        first_cell = F.pad(plan.keep.cumsum(0), (0, 0, 1, 0))
        bias = torch.zeros(plan.keep.shape)
        if plan.evicted is not None:  # of every KV head as many, as they keep as many
            bias = plan.evicted[..., 0].clamp(min=1).double().log().float()
        return torch.cat([own.int(), first_cell.int(), bias.view(torch.int32)])


@dataclass(frozen=True)
class DecodeStep:
    """The arguments of `varlen_decode` that layers share, and the tables each layer rewrites.

    first_key_bias: `[num_seqs * num_kv_heads]` fp32; None where no row stands for evicted ones.
    """

    block_table: Tensor
    seqused_k: Tensor
    cu_seqlens: Tensor  # of q, a row a request; of k it is not used
    first_key_bias: Tensor | None

    @classmethod
    def empty(
        cls, num_seqs: int, max_blocks: int, num_biased_heads: int, device: torch.device
    ) -> DecodeStep:
        """Room for num_seqs requests of max_blocks tokens; num_biased_heads: KV heads, or 0."""
        return cls(
            torch.zeros(num_seqs, max_blocks, dtype=torch.int32, device=device),
            torch.zeros(num_seqs, dtype=torch.int32, device=device),
            torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
            torch.zeros(num_seqs * num_biased_heads, device=device) if num_biased_heads else None,
        )

    def first(self, num_seqs: int, max_blocks: int) -> DecodeStep:
        """The part of a smaller batch, and a narrower one."""
        table = self.block_table.view(-1)[: num_seqs * max_blocks].view(num_seqs, max_blocks)
        bias = self.first_key_bias
        if bias is not None:
            bias = bias[: num_seqs * (len(bias) // len(self.seqused_k))]
        return DecodeStep(table, self.seqused_k[:num_seqs], self.cu_seqlens[: num_seqs + 1], bias)


class Overflow:
    """Whether a decode step had more live tokens of a request than its table has columns: what the
    host counts bounds them, and if it ever did not, answers would lack their last tokens.

    longest: `[1]` int32 on the device, live tokens of such a request; 0 as long as there was none.
    """

    def __init__(self, device: torch.device) -> None:
        self.longest = torch.zeros(1, dtype=torch.int32, device=device)
        self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")

    def check(self) -> None:
        """Before a step: look at what is known of those before. Never waits for the device, which
        may take until a later step to say so.

        Raises:
            RuntimeError: where a request had more.
        """
        self._seen.copy_(self.longest, non_blocking=True)
        if (longest := int(self._seen)) > 0:
            raise RuntimeError(
                f"--attention-backend vlcache: got a request with {longest} live tokens in a decode"
                " step made for fewer, whose answer lacks the last of them; expected no more than"
                " the scheduler had counted (please report it; VLCACHE_BUDGET=1.0 leaves all whole)"
            )


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
    step: DecodeStep,
    overflow: Overflow | None = None,
) -> None:
    """Write one layer's tables. No sync, no allocation.

    Args:
        req_to_token: `[*, max_context]` int32, SGLang's slots of each request.
        req_pool_indices: `[num_seqs]` the rows of req_to_token. seq_lens: `[num_seqs]`, tokens of
            each request, evicted ones included.
        num_rows: slots of the pool, padding included.
        step: out. block_table: rows of the flat view, for K; entries behind a request's last are
            left as they are. seqused_k: live rows. first_key_bias, where there is one.
        overflow: where a request with more rows than the table has columns is noted.
    """
    num_seqs, max_blocks = step.block_table.shape
    bias = step.first_key_bias
    num_kv_heads = 1 if bias is None else len(bias) // num_seqs
    sizes = [1, 1, layout.num_layers + 1, layout.num_layers]
    prompt_end, first_slot, first_cell, first_key_bias = layout.table.split(sizes)
    with torch.cuda.device_of(req_to_token):
        _block_table_kernel[(num_seqs, min(triton.cdiv(max_blocks, BLOCK), PROGRAMS))](
            req_to_token,
            req_pool_indices,
            seq_lens,
            prompt_end,
            first_slot,
            first_cell,
            first_key_bias.view(torch.float32),
            step.block_table,
            step.seqused_k,
            bias,
            None if overflow is None else overflow.longest,
            layer,
            layout.num_layers,
            num_rows,
            max_blocks,
            req_to_token.stride(0),
            layout.table.stride(0),
            NUM_KV_HEADS=num_kv_heads,
            HEADS_PADDED=triton.next_power_of_2(num_kv_heads),
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
    bias_ptr,  # of each layer and row of req_to_token
    block_table_ptr,
    seqused_k_ptr,
    first_key_bias_ptr,  # of each sequence and KV head, or None
    longest_ptr,  # [1], or None
    layer,
    num_layers,
    num_rows,
    max_blocks,
    stride_req,
    stride_layer,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
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
    live = tl.maximum(seq_len - prompt_end + kept, 0)
    length = tl.minimum(live, max_blocks)
    if block == 0:
        if longest_ptr is not None:
            tl.atomic_max(longest_ptr, live, mask=live > max_blocks, sem="relaxed")
        tl.store(seqused_k_ptr + seq, length)
        if first_key_bias_ptr is not None:
            bias = tl.load(bias_ptr + layer * stride_layer + row)
            heads = tl.arange(0, HEADS_PADDED)
            first_key_bias_ptr += seq * NUM_KV_HEADS + heads
            tl.store(first_key_bias_ptr, bias, mask=heads < NUM_KV_HEADS)
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
