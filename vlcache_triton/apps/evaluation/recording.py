"""One prefill of a prompt with the full cache, from which any policy can compress a copy."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlcache_triton.integrations.transformers.cache import VLCache, VLCacheLayer
from vlcache_triton.integrations.transformers.support import check_made_for
from vlcache_triton.kernels.types import PostVisionStats
from vlcache_triton.ops import Backend
from vlcache_triton.pool.compress import PromptCompressor, move_layer, shape_of
from vlcache_triton.pool.ragged import RaggedCache
from vlcache_triton.pool.shape import PoolShape
from vlcache_triton.recipe.config import VLCacheConfig
from vlcache_triton.recipe.plan import CompressionPlan, make_plan
from vlcache_triton.recipe.prompt import Prompt, count_query_rows
from vlcache_triton.recipe.report import CompressionReport
from vlcache_triton.recipe.softmax import Softmax
from vlcache_triton.recipe.statistics import LayerStats, measure_layer

from .variants import Variant


@dataclass(frozen=True)
class Query:
    """A prompt as the model takes it, and what follows before the answer that counts.

    inputs: keyword arguments of the model's forward pass, of one sequence; no cache.
    continuation: `[n]` int64, tokens read after the prompt was compressed, the same for every
        policy: earlier answers and later questions. Empty for a single turn.
    """

    inputs: dict[str, Any]
    continuation: Tensor


class _Layer(NamedTuple):
    """A layer of the prompt after RoPE: k, v `[length, num_kv_heads, d]`, q
    `[1, num_heads, length, d]`."""

    k: Tensor
    v: Tensor
    q: Tensor
    softmax: Softmax


class _Watched(RaggedCache):
    """A ragged cache that remembers the query rows it was asked about, for the attention oracle."""

    def __init__(self, shape: PoolShape, backend: Backend) -> None:
        super().__init__(shape, backend)
        self.queries: list[list[Tensor]] = [[] for _ in range(shape.num_layers)]

    def attend(self, layer: int, q: Tensor, softmax: Softmax) -> Tensor:
        self.queries[layer].append(q[0].transpose(0, 1))  # [n, num_heads, d]
        return super().attend(layer, q, softmax)


class _Recorder(PromptCompressor):
    """Packs a prompt into a watched cache, and notes its layers in `recorded`."""

    def __init__(self, recorded: list[_Layer], prompt: Prompt, *args: Any) -> None:
        if len(prompt.pads) != 1:
            raise ValueError(f"input_ids: got {len(prompt.pads)} sequences, expected one")
        super().__init__(prompt, *args)
        self._recorded = recorded

    def add(self, k: Tensor, v: Tensor, q: Tensor, softmax: Softmax) -> None:
        self._recorded.append(_Layer(k, v, q, softmax))
        super().add(k, v, q, softmax)

    def pack(
        self, head_room: int, allocate: Callable[..., RaggedCache] = RaggedCache
    ) -> tuple[CompressionPlan, RaggedCache]:
        return super().pack(head_room, _Watched)


class Recording:
    """The full cache of one prompt, in the ragged layout, with all that a policy may look at.

    cache: for the full cache's answer behind the prompt; `compress` makes compressed copies of it.
    logits: of the prompt's last row, `[1, vocab_size]`.

    Args:
        model: inside a vl_cache block; it reads the prompt, now.
        max_new_tokens: of an answer, here and in the copies.
    """

    @torch.no_grad()
    def __init__(self, model: Any, query: Query, max_new_tokens: int) -> None:
        self.model, self.query, self.max_new_tokens = model, query, max_new_tokens
        self._room = len(query.continuation) + max_new_tokens
        lossless = VLCacheConfig(budget=1.0)
        self.cache = VLCache(model.config, lossless, max_new_tokens=self._room)
        self._recorded: list[_Layer] = []
        self._stats: dict[Hashable, list[LayerStats]] = {}
        contents = self.cache.contents
        contents.make_compressor = functools.partial(_Recorder, self._recorded)
        contents.packs_whole = True
        out = model(**query.inputs, cache=self.cache, use_cache=True)
        self.logits = out.logits[:, -1]
        # Windows and states, as the prompt has left them.
        self._other_layers: dict[int, Any] = {
            i: copy.deepcopy(layer, {id(contents): contents})
            for i, layer in enumerate(self.cache.layers)
            if not isinstance(layer, VLCacheLayer)
        }

    @property
    def prompt(self) -> Prompt:
        """The one that was read."""
        assert self.cache.prompt is not None
        return self.cache.prompt

    @property
    def _ragged(self) -> _Watched:
        assert isinstance(self.cache.ragged, _Watched)
        return self.cache.ragged

    @property
    def backend(self) -> Backend:
        """What it is measured and compressed by."""
        return self._ragged.backend

    @property
    def prompt_bytes(self) -> int:
        """K and V of the prompt in the layers that are compressed."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self._recorded)

    @property
    def num_rows(self) -> int:
        """K and V rows of the prompt, over layers and KV heads."""
        return sum(layer.k.shape[0] * layer.k.shape[1] for layer in self._recorded)

    def answer_stats(self, num_rows: int) -> list[PostVisionStats]:
        """What the last `num_rows` rows decoded say of each layer of the full cache: the attention
        that each token received, summed over rows and averaged over the query heads of a KV head,
        and how sparse it is."""
        ragged, stats = self._ragged, []
        for layer, recorded in enumerate(self._recorded):
            starts = ragged.cu_seqlens_k[layer, :-1].long()
            rows = starts[:, None] + torch.arange(self.cache.get_seq_length(), device=starts.device)
            k = ragged.k[rows, 0].transpose(0, 1).contiguous()  # [num_seen, num_kv_heads, d]
            q = torch.cat(ragged.queries[layer])[-num_rows:]
            cu_seqlens = [
                torch.tensor([0, len(x)], dtype=torch.int32, device=k.device) for x in (q, k)
            ]
            stats.append(
                ragged.backend.post_vision_stats(
                    q,
                    k,
                    *cu_seqlens,
                    len(q),
                    len(k),
                    **recorded.softmax._asdict(),
                )
            )
        return stats

    def compress(self, plans: Sequence[CompressionPlan]) -> VLCache:
        """One cache of as many sequences as plans: the prompt, compressed in each way.

        Memory: what is kept, and the dense K and V of one layer for each plan in passing.
        """
        plan, backend = _stack_plans(plans), self.backend
        num_seqs, head_room = plan.head_keep.shape[1], self.cache.contents.head_room
        k, v = self._recorded[0].k, self._recorded[0].v
        shape = shape_of(plan, head_room, k, v, plan.evicted is not None)
        ragged = RaggedCache(shape, backend)
        ragged.lay_out(plan, head_room)
        for layer, recorded in enumerate(self._recorded):
            k, v = (x.repeat(num_seqs, 1, 1) for x in (recorded.k, recorded.v))
            move_layer(plan, ragged, layer, k, v)
        copies = VLCache(self.model.config, max_new_tokens=self._room)
        copies.contents.hold(plan, ragged)
        # Positions of M-RoPE lag behind alike.
        copies.rope_deltas = [
            None if x is None else x.expand(num_seqs, -1) for x in self.cache.rope_deltas
        ]
        for i, layer in self._other_layers.items():
            layer = copy.deepcopy(layer, {id(self.cache.contents): copies.contents})
            layer.batch_repeat_interleave(num_seqs)
            copies.layers[i] = layer
        return copies

    def report(self, variant: Variant, plan: CompressionPlan) -> CompressionReport:
        """What a variant's compression does, as a session would report it."""
        allocated = self.compress([plan]).ragged
        assert allocated is not None
        layers, budget = self.cache.contents.layers, variant.effective.budget
        nbytes = self.prompt_bytes, allocated.nbytes, allocated.row_nbytes
        return CompressionReport.of(plan, budget, layers, *nbytes)

    def plan_for(self, variant: Variant) -> CompressionPlan:
        """What a variant keeps of the prompt."""
        prompt, stats = self.measure(variant)
        return make_plan(stats, prompt, variant.effective, self.backend, variant.policy)

    def measure(self, variant: Variant) -> tuple[Prompt, list[LayerStats]]:
        """The prompt with a variant's query rows, and what they say of each layer; measured once
        for all variants that look at the same."""
        check_made_for(variant.policy, self.model.config)
        config, backend = variant.effective, self.backend
        if config.is_fp8:
            raise NotImplementedError(
                f"{variant.name}: got kv_cache_dtype={config.kv_cache_dtype!r}, expected 'auto':"
                " all variants of a prompt share one pool"
            )
        (post_vision,), (length,) = self.prompt.query_rows, self.prompt.lengths
        rows = count_query_rows(post_vision, length, config, variant.policy)
        prompt = dataclasses.replace(self.prompt, query_rows=(rows,))
        key = (
            rows,
            config.threshold,
            config.row_reduction,
            config.group_reduction,
            variant.policy.row_weights,
            variant.policy.guide_rows,
            variant.policy.key_value_stats,
            variant.policy.outside,
        )
        if key not in self._stats:
            asked = (prompt, config, backend, variant.policy)
            self._stats[key] = [
                measure_layer(layer, x.k, x.v, x.q, x.softmax, *asked)
                for layer, x in enumerate(self._recorded)
            ]
        return prompt, self._stats[key]


def _stack_plans(plans: Sequence[CompressionPlan]) -> CompressionPlan:
    """Plans of one prompt as the plan of a batch that repeats it."""
    pieces = [p.indices.split(p.head_tokens.sum((1, 2)).tolist()) for p in plans]  # by layer
    indices = torch.cat([piece for layer in zip(*pieces, strict=True) for piece in layer])
    counts = torch.cat([p.head_tokens for p in plans], 1).flatten().to(indices.device)
    evicted = None
    if any(p.evicted is not None for p in plans):
        none = torch.zeros_like(plans[0].head_keep)
        evicted = torch.cat([none if p.evicted is None else p.evicted for p in plans], 1)
    return CompressionPlan(
        Prompt(
            plans[0].prompt.padded_length,
            (0,) * len(plans),
            tuple(p.prompt.query_rows[0] for p in plans),
        ),
        torch.cat([p.sparsity for p in plans], 1),
        torch.cat([p.head_keep for p in plans], 1),
        indices,
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
        evicted,
    )
