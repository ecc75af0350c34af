"""The prompts that are being compressed, or were: host facts, by request."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlcache_triton.recipe.budgets import layer_budgets
from vlcache_triton.recipe.config import VLCacheConfig
from vlcache_triton.recipe.policies import VL_CACHE
from vlcache_triton.recipe.prompt import count_query_rows


class ChunkStats(NamedTuple):
    """The post-vision statistics of one prompt, all layers, over the chunks seen.

    scores: `[num_layers, num_kv_heads, m]` fp32. retained: `[num_layers, num_heads]` int64. Both of
    the heads of this rank.
    """

    scores: Tensor
    retained: Tensor


@dataclass
class TrackedPrompt:
    """One request whose prompt is compressed at the end of its prefill.

    rid: of the request. req_pool_idx: its row of req_to_token.
    length: m, tokens of the prompt. prefilled: with the output that a retracted request prefills
        again behind it.
    first_row: where the query rows begin; they end with the prompt.
    num_slots: slots that the compressed prompt takes, ceil(Σ k_l / L).
    protected: the first tokens, whose slots belong to the radix tree.
    stats: what the chunks seen say.
    is_packed: its kept tokens lie in the first `num_slots` of its own slots.
    evicted: tokens that every layer evicted, once it is packed.
    private: those slots, once the others went back to the scheduler.
    """

    rid: str
    req_pool_idx: int
    length: int
    first_row: int
    num_slots: int
    prefilled: int = 0
    protected: int = 0
    stats: ChunkStats | None = None
    is_packed: bool = False
    evicted: int = 0
    private: Tensor | None = None

    @property
    def query_rows(self) -> int:
        """τ."""
        return self.length - self.first_row

    @property
    def visible(self) -> int:
        """Entries that the query rows of one head see: row i sees i + 1 keys."""
        return self.query_rows * (self.first_row + self.length + 1) // 2


class PromptTable:
    """Which requests are compressed, from their first chunk until their slots are released.

    Args:
        num_layers: of the model.
    """

    def __init__(self, config: VLCacheConfig, num_layers: int) -> None:
        self.config, self.num_layers = config, num_layers
        #: At least the longest live length of the decode step to come, written before it.
        self.longest_live: int | None = None
        self.graph_widths: tuple[int, ...] = ()  # what captured decode steps hold of a request
        self.has_freed = False  # slots, since admission was last looked at
        self._by_rid: dict[str, TrackedPrompt] = {}

    def __len__(self) -> int:
        return len(self._by_rid)

    def get(self, rid: str) -> TrackedPrompt | None:
        """None for a request that is left whole."""
        return self._by_rid.get(rid)

    def first_query_row(self, req: Any) -> int | None:
        """Where the query rows of a request's prompt begin; None where it is left whole."""
        if self.config.is_lossless or req.session is not None or req.beam_group is not None:
            return None  # sessions and beams share a row of slots among requests
        if (most := req.sampling_params.max_new_tokens) is not None and most <= 1:
            return None  # no step will decode over it
        length, boundary = len(req.origin_input_ids), image_end(req)
        if slots_needed(length, self.num_layers, self.config) >= length:
            return None  # nothing would be freed
        if boundary > 0:
            rows = max(length - boundary, 1)
        else:
            rows = min(self.config.text_window or 0, length)
        rows = count_query_rows(rows, length, self.config, VL_CACHE)
        return length - rows if rows else None

    def longest_prefix(self, req: Any) -> int | None:
        """How much of a prompt may be found in the radix tree; None: SGLang's own bound will do.

        Query rows must be computed. And what is kept must fit in slots that are not the tree's, or
        whether a prompt is compressed would depend on what others left there.
        """
        first_row = self.first_query_row(req)
        if first_row is None:
            return None
        length = len(req.origin_input_ids)
        num_slots = slots_needed(length, self.num_layers, self.config)
        return max(min(first_row, length - num_slots - 1), 0)

    def see(self, req: Any) -> None:
        """Note a request that is about to be prefilled, or a chunk of it."""
        first_row = self.first_query_row(req)
        if first_row is None:
            return
        length, protected = len(req.origin_input_ids), req.kv.cache_protected_len
        num_slots = slots_needed(length, self.num_layers, self.config)
        # What is evicted cannot be matched later, so the tree must not have it.
        req.skip_radix_cache_insert = True
        if num_slots >= length - protected:
            return  # longest_prefix rules it out; it has no slots to be packed in
        prompt = self._by_rid.get(req.rid)
        if prompt is None or prompt.req_pool_idx != req.kv.req_pool_idx:
            prompt = TrackedPrompt(req.rid, req.kv.req_pool_idx, length, first_row, num_slots)
            self._by_rid[req.rid] = prompt
        if not prompt.is_packed:
            prompt.protected, prompt.prefilled = protected, len(req.full_untruncated_fill_ids)

    def free_evicted(self, req: Any, req_to_token: Tensor, allocator: Any) -> None:
        """Give the slots behind the kept ones back to the scheduler, once its prefill is over."""
        prompt = self._by_rid.get(req.rid)
        if prompt is None or not prompt.is_packed or prompt.private is not None:
            return
        row = req_to_token[prompt.req_pool_idx]
        end = prompt.protected + prompt.num_slots
        prompt.private = row[prompt.protected : end].to(torch.int64, copy=True)
        allocator.free(row[end : prompt.length].to(torch.int64))
        row[end : prompt.length] = 0  # slot 0 is SGLang's padding slot
        # From here on SGLang frees what lies behind the prompt; the private slots are ours to free.
        req.kv.cache_protected_len = prompt.length
        self.has_freed = True

    def most_live(self, req: Any) -> int:
        """At least the tokens that a layer holds of a request in its next decode step."""
        prompt = self._by_rid.get(req.rid)
        return req.kv.kv_allocated_len - (0 if prompt is None else prompt.evicted)

    def private_tokens(self, kv: Any) -> int:
        """Slots held by the request of that KV record that SGLang's own count leaves out."""
        for prompt in self._by_rid.values():
            if prompt.req_pool_idx == kv.req_pool_idx and prompt.private is not None:
                return prompt.num_slots
        return 0

    def release(self, req: Any, allocator: Any) -> None:
        """Forget a request that finished, was aborted or retracted, and free its private slots."""
        prompt = self._by_rid.pop(req.rid, None)
        if prompt is not None and prompt.private is not None:
            allocator.free(prompt.private)

    def clear(self) -> None:
        """Forget all requests; the scheduler has reset its pools."""
        self._by_rid.clear()


def image_end(req: Any) -> int:
    """1 + the position of the last visual token of a prompt; 0 where there is none."""
    inputs = req.multimodal_inputs
    if inputs is None:
        return 0
    # Offsets are (first, last), both within the image. models/llava.py keeps (first, length).
    visual = [item for item in inputs.mm_items if not item.is_audio()]
    ends = [last + 1 for item in visual for _, last in item.offsets or []]
    starts = getattr(inputs, "image_offsets", None) or []
    lengths = getattr(inputs, "image_pad_len", None) or []
    ends += [start + length for start, length in zip(starts, lengths, strict=False)]
    return max(ends, default=0)


@functools.lru_cache(maxsize=4096)  # asked at each match and each chunk
def slots_needed(length: int, num_layers: int, config: VLCacheConfig) -> int:
    """ceil(Σ k_l / L): the sum of the layers' budgets does not depend on how they share it."""
    budgets = layer_budgets(torch.ones(num_layers, 1), torch.tensor([length]), config)
    return math.ceil(int(budgets.sum()) / num_layers)
