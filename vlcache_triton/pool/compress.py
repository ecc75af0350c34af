"""The whole way of a prompt: its layers go in as they are prefilled, a ragged cache comes out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..ops import Backend
from ..recipe.config import VLCacheConfig
from ..recipe.plan import CompressionPlan, make_plan, whole_plan
from ..recipe.policies import VL_CACHE, Policy
from ..recipe.prompt import Prompt
from ..recipe.softmax import Softmax
from ..recipe.statistics import LayerStats, measure_layer
from .ragged import RaggedCache
from .shape import PoolShape, kind_of


class PromptCompressor:
    """Takes the layers of one prompt, first to last, and packs what is kept of them.

    Holds the dense K and V of all layers until the last has come; `StreamingCompressor` does not.
    Where nothing is to be compressed (budget 1.0, no post-vision rows), everything is packed.

    Args:
        prompt: the batch; its `query_rows` say which rows are measured.
        num_layers: how many layers will be added; `num_added` counts them.
        config: as `policy.configure` returns it.
        policy: what tokens are ranked by, and how heads and layers share the budget.
    """

    def __init__(
        self,
        prompt: Prompt,
        num_layers: int,
        config: VLCacheConfig,
        backend: Backend,
        policy: Policy = VL_CACHE,
    ) -> None:
        self.prompt, self.num_layers = prompt, num_layers
        self.config, self.backend, self.policy = config, backend, policy
        self.compresses = prompt.is_compressible and not config.is_lossless
        self.num_added = self.bytes_seen = 0
        self._stats: list[LayerStats] = []
        self._rows: list[tuple[Tensor, Tensor]] = []

    def add(self, k: Tensor, v: Tensor, q: Tensor, softmax: Softmax) -> None:
        """One layer, after RoPE.

        Args:
            k, v: `[num_seqs * padded_length, num_kv_heads, d]`; kept by reference.
            q: `[num_seqs, num_heads, n, d]`, whose last rows are the prompts' last rows.
        """
        self._count(k, v)
        if self.compresses:
            self._stats.append(self._measure(k, v, q, softmax))
        self._rows.append((k, v))

    def pack(
        self, head_room: int, allocate: Callable[..., RaggedCache] = RaggedCache
    ) -> tuple[CompressionPlan, RaggedCache]:
        """What to keep, and the cache that keeps it, with `head_room` free rows a segment.

        Dense layers are let go of when all have moved: the peak is the full cache and the kept one.

        Args:
            allocate: called as `RaggedCache` is, where the caller has one to lend.
        """
        device = self._rows[0][0].device
        if self.compresses:
            plan = make_plan(self._stats, self.prompt, self.config, self.backend, self.policy)
        else:
            num_kv_heads = self._rows[0][0].shape[1]
            plan = whole_plan(self.prompt, self.num_layers, num_kv_heads, device)
        self._stats = []
        has_remainder = self.config.remainder != "none"
        is_fp8 = self.config.is_fp8 and self.compresses
        shape = shape_of(plan, head_room, *self._rows[0], has_remainder, is_fp8)
        ragged = allocate(shape, self.backend)
        ragged.lay_out(plan, head_room)
        k, v = zip(*self._rows, strict=True)
        self._rows = []
        starts, max_kept = self.prompt.starts(device), int(plan.head_keep.max())
        ragged.compact_layers(k, v, starts, plan.indices, plan.cu_kept, max_kept)
        for layer, rows in enumerate(zip(k, v, strict=True)):
            store_means(plan, ragged, layer, *rows)
        return plan, ragged

    def _count(self, k: Tensor, v: Tensor) -> None:
        self.num_added += 1
        self.bytes_seen += k.nbytes + v.nbytes

    def _measure(self, k: Tensor, v: Tensor, q: Tensor, softmax: Softmax) -> LayerStats:
        """What the policy asks for of the layer that is added; arguments as for `add`."""
        asked = (self.prompt, self.config, self.backend, self.policy)
        layer = self.num_added - 1
        return measure_layer(layer, k, v, q, softmax, *asked)


def shape_of(
    plan: CompressionPlan,
    head_room: int,
    k_like: Tensor,
    v_like: Tensor,
    has_remainder: bool,
    is_fp8: bool = False,
) -> PoolShape:
    """Of a ragged cache that holds what is kept, with `head_room` free rows a segment."""
    num_layers, num_seqs, num_kv_heads = plan.head_keep.shape
    return PoolShape(
        **kind_of(k_like, v_like),
        num_layers=num_layers,
        num_seqs=num_seqs,
        num_kv_heads=num_kv_heads,
        capacity=int(plan.head_keep.sum()) + plan.head_keep.numel() * head_room,
        max_seqlen_k=int(plan.head_keep.max()) + head_room,
        has_remainder=has_remainder,
        is_fp8=is_fp8,
    )


def move_layer(
    plan: CompressionPlan, ragged: RaggedCache, layer: int, k: Tensor, v: Tensor
) -> None:
    """What a layer keeps of dense k and v `[rows, num_kv_heads, d]`, into its segments."""
    starts, cu_kept = plan.prompt.starts(k.device), plan.layer_cu_kept(layer)
    max_kept = int(plan.head_keep[layer].max())
    ragged.compact_layer(layer, k, v, starts, plan.indices, cu_kept, max_kept)
    store_means(plan, ragged, layer, k, v)


def store_means(
    plan: CompressionPlan, ragged: RaggedCache, layer: int, k: Tensor, v: Tensor
) -> None:
    """The rows for what a layer evicts, where the plan has such rows; arguments as move_layer."""
    if plan.evicted is None:
        return
    prompt = plan.prompt
    sums = ragged.backend.sum_evicted(
        k,
        v,
        prompt.starts(k.device),
        plan.indices,
        plan.layer_cu_kept(layer),
        prompt.padded_length,
        seqused_k=prompt.seqused(k.device),
    )
    ragged.store_means(layer, *sums)
