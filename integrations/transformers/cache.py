"""The cache object: dense during prefill, ragged per KV head once the prompt is compressed."""

from __future__ import annotations

import functools
import weakref
from math import isnan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from vlcache_triton import VLCacheConfig
from vlcache_triton.backend import BackendName, get_backend
from vlcache_triton.compress import PromptCompressor
from vlcache_triton.plan import CompressionPlan
from vlcache_triton.policies import VL_CACHE, Policy
from vlcache_triton.prompt import Prompt
from vlcache_triton.ragged import RaggedCache
from vlcache_triton.report import CompressionReport
from vlcache_triton.streaming import StreamingCompressor

from .support import check_config, layer_types

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
        if owner.prompt is None:
            raise RuntimeError(
                "VLCache: got rows of a prompt that nobody announced, expected a forward pass"
                " inside a vl_cache block"
            )
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
        """Hand the prompt's K, V and query rows to compression, where there is to be any."""
        owner = self.owner
        if owner.will_pack:
            assert self.keys is not None and self.values is not None
            # By row, as projections and RoPE leave them behind: views.
            k, v = (x.detach().transpose(1, 2).flatten(0, 1) for x in (self.keys, self.values))
            self.keys = self.values = None
            owner.compress_layer(k, v, query, softmax_scale)

    def get_seq_length(self) -> int:
        """Tokens seen, not tokens kept: positions go on from here."""
        return self.owner.num_seen if self.keys is None else super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(0, 0) once compressed, for which the mask function makes no mask."""
        is_ragged = self.owner.ragged is not None
        return (0, 0) if is_ragged else (self.get_seq_length() + query_length, 0)

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
        policy: what ranks tokens and shares the budget out; VL-Cache, or one of its rivals.
        max_new_tokens: tokens expected after the prompt; sizes the head room. More tokens are
            taken all the same, for a copy of the compressed cache now and then.
        backend: see `get_backend`.
        streaming: compress during prefill, so that the dense cache of all layers never exists at
            once; the same result, for a host sync a layer (see `StreamingCompressor`).
        graphs: whose captured steps decode on this cache; even a whole prompt is packed then.

    Raises:
        NotImplementedError: for models that VL-Cache is not defined on, and for another policy
            with streaming, which is exact for VL-Cache's budgets alone.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: VLCacheConfig | None = None,
        *,
        policy: Policy = VL_CACHE,
        max_new_tokens: int = MAX_HEAD_ROOM,
        backend: BackendName = "auto",
        streaming: bool = False,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected an int >= 1")
        if streaming and policy is not VL_CACHE:
            raise NotImplementedError(
                f"streaming: got True with the policy {policy.name!r}, expected it with VL-Cache's"
            )
        check_config(model_config)
        text_config = model_config.get_text_config(decoder=True)
        layers: list[Any] = []
        self._num_layers = 0  # of full attention
        for layer_type in layer_types(text_config):
            if layer_type == "full_attention":
                layers.append(VLCacheLayer(self, self._num_layers))
                self._num_layers += 1
            elif layer_type == "sliding_attention":
                layers.append(DynamicSlidingWindowLayer(text_config.sliding_window))
            else:
                layers.append(DynamicSlidingWindowLayer(text_config.attention_chunk_size))
        super().__init__(layers=layers)
        self.config, self.policy = policy.configure(config or VLCacheConfig()), policy
        self.backend_name: BackendName = backend
        self.head_room = min(max_new_tokens, MAX_HEAD_ROOM)
        self.streaming, self.graphs = streaming, graphs
        self._forget()

    def _forget(self) -> None:
        self.prompt: Prompt | None = None
        self.plan: CompressionPlan | None = None
        self.ragged: RaggedCache | None = None
        self.num_seen = 0  # tokens, while compressed
        self._step_rows = 0
        self._compressor: PromptCompressor | None = None
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

    @property
    def has_windows(self) -> bool:
        """Whether some layers have a window, and so a cache of their own kind."""
        return self._num_layers < len(self.layers)

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

    def take_back(self, num_rows: int) -> None:
        """Forget the last rows of every sequence: of steps that had run past the answer's end."""
        if num_rows > 0:
            assert self.ragged is not None and not self.has_windows
            self.ragged.seqused_k -= num_rows
            self.ragged.room += num_rows
            self.num_seen -= num_rows

    def check_step(self, num_rows: int) -> None:
        """Refuse rows that nobody announced: the attention would not see the cache either."""
        if num_rows != self._step_rows:
            raise RuntimeError(
                f"VLCache: got {num_rows} rows in a step of {self._step_rows}, expected a forward"
                " pass inside the vl_cache block"
            )

    def compress_layer(self, k: Tensor, v: Tensor, query: Tensor, softmax_scale: float) -> None:
        """Take a layer of the prompt; the last one makes the cache ragged.

        Args: as `PromptCompressor.add`.
        """
        assert self.prompt is not None
        if self._compressor is None:
            backend = get_backend(self.backend_name, k.device)
            make = StreamingCompressor if self.streaming else PromptCompressor
            self._compressor = make(
                self.prompt, self._num_layers, self.config, backend, self.policy
            )
        compressor = self._compressor
        with torch.no_grad():
            compressor.add(k, v, query.detach(), softmax_scale)
            if compressor.num_added < self._num_layers:
                return
            allocate: Any = RaggedCache
            if self.graphs is not None:
                allocate = functools.partial(self.graphs.allocate, self)
            plan, self.ragged = compressor.pack(self.head_room, allocate)
        self._compressor = None
        self.num_seen = self.prompt.padded_length
        if self.will_compress:
            self.plan = plan
            self._report = self._make_report(plan, compressor.bytes_seen, self.ragged.nbytes)

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
        layers: list[Any] = self.layers
        for layer in layers:  # Transformers 5.17 would keep tensors of zeros, and append to them
            layer.keys = layer.values = None
            layer.is_initialized = False
        super().reset()
        self._forget()

    def activate_past_recording(self) -> None:
        """Refused: compression cannot be rolled back."""
        raise NotImplementedError("VLCache: got assisted decoding, expected plain decoding")

    def _make_report(
        self, plan: CompressionPlan, bytes_before: int, bytes_allocated: int
    ) -> CompressionReport:
        dense_rows = plan.keep.numel() * plan.prompt.padded_length
        return CompressionReport(
            budget=self.config.budget,
            layers=[i for i, layer in enumerate(self.layers) if isinstance(layer, VLCacheLayer)],
            sparsity=[[None if isnan(x) else x for x in row] for row in plan.sparsity.tolist()],
            kept=plan.keep.tolist(),
            lengths=list(plan.prompt.lengths),
            bytes_before=bytes_before,
            bytes_after=bytes_before * int(plan.keep.sum()) // dense_rows,
            bytes_allocated=bytes_allocated,
        )


def _tagged(key: Tensor, layer: VLCacheLayer) -> Tensor:
    """A view of key that carries its cache layer to the attention function.

    A view, as the layer holds the tensor itself: a tag on that would keep both alive in a cycle.
    """
    view = key.view_as(key)
    view.vlcache_layer = layer  # type: ignore[attr-defined]
    return view
