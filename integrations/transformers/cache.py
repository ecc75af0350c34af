"""The cache object: dense during prefill, ragged per KV head once the prompt is compressed."""

from __future__ import annotations

import weakref
from math import isnan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from vlcache_triton import VLCacheConfig
from vlcache_triton.backend import Backend, BackendName, get_backend
from vlcache_triton.plan import CompressionPlan, make_plan, whole_plan
from vlcache_triton.prompt import Prompt
from vlcache_triton.ragged import RaggedCache
from vlcache_triton.reference import PostVisionStats
from vlcache_triton.report import CompressionReport

from .support import layer_types

if TYPE_CHECKING:
    from .graph import DecodeGraphs

MAX_HEAD_ROOM = 256  # rows reserved for new tokens at compression; a longer answer grows the pools


class VLCacheLayer(DynamicLayer):
    """A full-attention layer. The attention function finds it on the key tensor it is handed."""

    is_croppable = False

    def __init__(self, owner: VLCache, index: int) -> None:
        super().__init__()
        # Weakly, so that a cache that is dropped frees its memory at once.
        self._owner = weakref.ref(owner)
        self.index = index  # among the layers that are compressed

    @property
    def owner(self) -> VLCache:
        """The cache that this is a layer of."""
        owner = self._owner()
        if owner is None:
            raise RuntimeError("VLCacheLayer: its VLCache is gone, expected it to be kept alive")
        return owner

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Store a step's K and V `[num_seqs, num_kv_heads, n, d]`; what to attend to comes back."""
        owner = self.owner
        if owner.ragged is not None:
            owner.check_step(key_states.shape[2])
            owner.ragged.append(self.index, key_states, value_states)
            return _tagged(key_states, self), value_states
        if not owner.will_pack:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return _tagged(keys, self), values
        # Borrowed, not copied: compression soon takes what it keeps.
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states, value_states
        return _tagged(key_states, self), value_states

    def attend(self, query: Tensor, softmax_scale: float) -> Tensor | None:
        """Attention over the compressed cache `[num_seqs, n, num_heads, d_v]`; None while dense."""
        ragged = self.owner.ragged
        return None if ragged is None else ragged.attend(self.index, query, softmax_scale)

    def observe(self, query: Tensor, softmax_scale: float) -> None:
        """Take the statistics of the prompt's post-vision rows; the last layer compresses all."""
        self.owner.observe(self, query, softmax_scale)

    def dense_rows(self) -> tuple[Tensor, Tensor]:
        """K and V before compression, `[num_seqs * padded_length, num_kv_heads, d]`: views of what
        projections and RoPE leave behind, which lies by row."""
        assert self.keys is not None and self.values is not None
        return self.keys.transpose(1, 2).flatten(0, 1), self.values.transpose(1, 2).flatten(0, 1)

    def get_seq_length(self) -> int:
        """Tokens seen, not tokens kept: positions go on from here."""
        owner = self.owner
        return super().get_seq_length() if owner.ragged is None else owner.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(0, 0) once compressed, for which the mask function makes no mask."""
        return super().get_mask_sizes(query_length) if self.owner.ragged is None else (0, 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: compression cannot be rolled back."""
        if tokens_to_remove != 0:
            raise NotImplementedError(
                f"crop: got {tokens_to_remove} tokens to remove, expected 0: a VLCache cannot be"
                " rolled back"
            )

    def offload(self) -> None:
        """Refused: what is left is small."""
        raise NotImplementedError("VLCache: got an offloaded cache, expected one on the device")


class VLCache(Cache):
    """A KV cache that compresses itself once, at the end of the prompt's forward pass.

    Full-attention layers are compressed; sliding and chunked layers stay as Transformers makes
    them. Use it inside `with vl_cache(model, ...)`, where each prompt finds its boundary; tokens
    after the prompt (answers, later turns) are kept whole. At budget 1.0, and for prompts without
    post-vision rows, it is a dynamic cache.

    Args:
        model_config: `model.config`.
        config: the choices of compression.
        max_new_tokens: tokens expected after the prompt; sizes the head room. More tokens are
            taken all the same, for a copy of the compressed cache now and then.
        backend: see `get_backend`.
        graphs: whose captured steps decode on this cache; even a whole prompt is packed then.

    Raises:
        NotImplementedError: for layer types that VL-Cache is not defined on.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: VLCacheConfig | None = None,
        *,
        max_new_tokens: int = MAX_HEAD_ROOM,
        backend: BackendName = "auto",
        graphs: DecodeGraphs | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected an int >= 1")
        text_config = model_config.get_text_config(decoder=True)
        layers: list[Any] = []
        self._full_layers: list[VLCacheLayer] = []
        for layer_type in layer_types(text_config):
            if layer_type == "full_attention":
                self._full_layers.append(VLCacheLayer(self, len(self._full_layers)))
                layers.append(self._full_layers[-1])
            elif layer_type == "sliding_attention":
                layers.append(DynamicSlidingWindowLayer(text_config.sliding_window))
            else:
                layers.append(DynamicSlidingWindowLayer(text_config.attention_chunk_size))
        super().__init__(layers=layers)
        self.config = config or VLCacheConfig()
        self.backend_name: BackendName = backend
        self.head_room = min(max_new_tokens, MAX_HEAD_ROOM)
        self.graphs = graphs
        self._forget()

    def _forget(self) -> None:
        self.prompt: Prompt | None = None
        self.plan: CompressionPlan | None = None
        self.ragged: RaggedCache | None = None
        self.num_seen = 0  # tokens, while compressed
        self._step_rows = 0
        self._stats: list[PostVisionStats] = []
        self._report: CompressionReport | None = None

    @property
    def will_compress(self) -> bool:
        """Whether the current prompt is to be compressed, or has been."""
        return (
            self.prompt is not None and self.prompt.is_compressible and not self.config.is_lossless
        )

    @property
    def will_pack(self) -> bool:
        """Whether the current prompt goes, or has gone, into a ragged cache: to be compressed, or
        whole, for captured steps to decode on."""
        return self.will_compress or (self.prompt is not None and self.graphs is not None)

    @property
    def is_compressed(self) -> bool:
        """Whether the prompt has been compressed."""
        return self.will_compress and self.ragged is not None

    def begin(self, prompt: Prompt) -> None:
        """Announce the prompt whose forward pass comes next; the cache must be empty."""
        if self.get_seq_length() != 0:
            raise ValueError(f"cache: got {self.get_seq_length()} tokens in it, expected none")
        self.prompt = prompt

    def begin_step(self, num_rows: int) -> None:
        """Announce a forward pass of `num_rows` tokens a sequence over the compressed cache."""
        if self.ragged is not None:
            self.ragged.reserve(num_rows)
            self._step_rows = num_rows

    def end_step(self) -> None:
        """Count the rows of the pass that was announced: once, for all layers."""
        if self.ragged is not None:
            self.ragged.room -= self._step_rows
            self.num_seen += self._step_rows
            self._step_rows = 0

    def check_step(self, num_rows: int) -> None:
        """Refuse rows that nobody announced: the attention would not see the cache either."""
        if num_rows != self._step_rows:
            raise RuntimeError(
                f"VLCache: got {num_rows} rows in a step of {self._step_rows}, expected a forward"
                " pass inside the vl_cache block"
            )

    def observe(self, layer: VLCacheLayer, query: Tensor, softmax_scale: float) -> None:
        """Statistics of one layer: query `[num_seqs, num_heads, padded_length, d]`, after RoPE.

        The last layer's observation packs all layers.
        """
        if not self.will_pack:
            return
        assert self.prompt is not None
        backend = get_backend(self.backend_name, query.device)
        with torch.no_grad():
            if self.will_compress:
                self._stats.append(self._measure(layer, query, softmax_scale, backend))
            if layer is self._full_layers[-1]:
                if self.will_compress:
                    plan = make_plan(self._stats, self.prompt, self.config, backend)
                else:
                    num_kv_heads = layer.dense_rows()[0].shape[1]
                    plan = whole_plan(
                        self.prompt, len(self._full_layers), num_kv_heads, query.device
                    )
                self._stats = []
                self._pack(plan, backend)

    def _measure(
        self, layer: VLCacheLayer, query: Tensor, softmax_scale: float, backend: Backend
    ) -> PostVisionStats:
        assert self.prompt is not None
        cu_seqlens_q, cu_seqlens_k = self.prompt.cu_seqlens(query.device)
        return backend.post_vision_stats(
            self.prompt.pack_query_rows(query),
            layer.dense_rows()[0],
            cu_seqlens_q,
            cu_seqlens_k,
            max(self.prompt.query_rows),
            max(self.prompt.lengths),
            softmax_scale=softmax_scale,
            threshold=self.config.threshold,
        )

    def report(self) -> CompressionReport | None:
        """What compression did; None where nothing was compressed."""
        return self._report

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i what sequence beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        layers: list[Any] = self.layers
        for layer in layers:
            if self.ragged is None or not isinstance(layer, VLCacheLayer):
                layer.batch_select_indices(indices)
        if self.ragged is not None:
            self.ragged.select_sequences(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.ragged is None:
            super().batch_repeat_interleave(repeats)
        else:
            index = torch.arange(self.ragged.num_seqs).repeat_interleave(repeats)
            self.batch_select_indices(index)

    def reset(self) -> None:
        """Empty; ready for another prompt."""
        super().reset()
        self._forget()

    def activate_past_recording(self) -> None:
        """Refused: compression cannot be rolled back."""
        raise NotImplementedError("VLCache: got assisted decoding, expected plain decoding")

    def _pack(self, plan: CompressionPlan, backend: Backend) -> None:
        layers, prompt = self._full_layers, plan.prompt
        bytes_before = sum(x.nbytes for layer in layers for x in layer.dense_rows())
        num_segments = len(prompt.pads) * plan.num_kv_heads
        rows = int(plan.keep.sum()) * plan.num_kv_heads
        shape = (
            rows + len(layers) * num_segments * self.head_room,
            int(plan.keep.max()) + self.head_room,
            len(layers),
            num_segments,
            plan.num_kv_heads,
            *layers[0].dense_rows(),
            backend,
        )
        graphs = self.graphs
        ragged = RaggedCache(*shape) if graphs is None else graphs.allocate(self, *shape)
        ragged.lay_out(plan, self.head_room)
        for layer in layers:
            ragged.compact_layer(layer.index, *layer.dense_rows(), plan)
            layer.keys = layer.values = None  # freed as we go: the peak is full + kept
        self.ragged, self.num_seen = ragged, prompt.padded_length
        if self.will_compress:
            self.plan = plan
            dense_rows = len(layers) * prompt.padded_length * len(prompt.pads)
            bytes_after = bytes_before * int(plan.keep.sum()) // dense_rows
            self._report = self._make_report(plan, bytes_before, bytes_after, ragged.nbytes)

    def _make_report(
        self, plan: CompressionPlan, bytes_before: int, bytes_after: int, bytes_allocated: int
    ) -> CompressionReport:
        return CompressionReport(
            budget=self.config.budget,
            layers=[i for i, layer in enumerate(self.layers) if layer in self._full_layers],
            sparsity=[[None if isnan(x) else x for x in row] for row in plan.sparsity.tolist()],
            kept=plan.keep.tolist(),
            lengths=list(plan.prompt.lengths),
            bytes_before=bytes_before,
            bytes_after=bytes_after,
            bytes_allocated=bytes_allocated,
        )


def _tagged(key: Tensor, layer: VLCacheLayer) -> Tensor:
    """A view of key that carries its cache layer to the attention function.

    A view, as the layer holds the tensor itself: a tag on that would keep both alive in a cycle.
    """
    view = key.view_as(key)
    view.vlcache_layer = layer  # type: ignore[attr-defined]
    return view
