"""The cache object that Transformers sees: its layers, and what is to be done with all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from vlcache_triton import VLCacheConfig
from vlcache_triton.ops import BackendName
from vlcache_triton.pool.allocator import PoolAllocator
from vlcache_triton.pool.packed import PackedCache
from vlcache_triton.pool.ragged import RaggedCache
from vlcache_triton.pool.rings import WindowRings
from vlcache_triton.pool.shape import RingShape, kind_of
from vlcache_triton.pool.states import LayerStates, state_shapes
from vlcache_triton.recipe.plan import CompressionPlan
from vlcache_triton.recipe.policies import VL_CACHE, Policy
from vlcache_triton.recipe.prompt import Prompt
from vlcache_triton.recipe.report import CompressionReport

from .contents import Contents
from .layers import StateLayer, VLCacheLayer, WindowLayer
from .support import (
    STATE_TYPES,
    check_choices,
    check_config,
    check_made_for,
    describe_model,
    layer_types,
    window_of,
)

MAX_HEAD_ROOM = 256  # rows reserved for new tokens at compression; a longer answer grows the pools


class VLCache(Cache):
    """A KV cache that compresses itself at the end of the prompt's forward pass.

    Full-attention layers are compressed; sliding and chunked layers keep their windows, linear,
    convolution and Mamba layers their states. Use it inside `with vl_cache(model, ...)`, where
    each prompt finds its boundary. Of a later turn with an image its budget is kept as well,
    measured by its own rows; answers and turns of text are kept whole, unless `max_cache_tokens`
    says how much there may be. At budget 1.0, and for prompts without post-vision rows, it is a
    dynamic cache.

    One image, many questions: `copy.deepcopy(cache)` for each question that is asked behind the
    prompt; a copy has memory of its own. `torch.save(cache, file)` and, in another process,
    `torch.load(file, weights_only=False)` (as pickles run code, of files that you trust) do for
    later questions. Copied and saved between passes, and used inside any `vl_cache` block of the
    same model; another one is refused. A copy decodes with its block's captured steps.

    contents: what is in it, and in which state.
    made_for: the model, by its type, its name or folder, and its text configuration's sizes.
    position_ids: of the last rows of the latest pass `[..., num_seqs, 1]`, if it was given any.
    rope_deltas: what the model has noted on itself, `[num_seqs, 1]` each (see rope_state.py).

    Args:
        model_config: `model.config`.
        config: the choices of compression.
        policy: what ranks tokens and shares the budget out; VL-Cache, or one of its rivals.
        max_new_tokens: tokens expected after the prompt; sizes the head room. More tokens are
            taken all the same, for a copy of the compressed cache now and then.
        backend: see `get_backend`.
        streaming: compress during prefill, so that the dense cache of all layers never exists at
            once; the same result, for a host sync a layer (see `StreamingCompressor`).
        allocator: lends the memory that captured steps decode on; even a whole prompt is packed
            then.

    Raises:
        ValueError: for what is no configuration or policy.
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
        allocator: PoolAllocator | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected an int >= 1")
        config = VLCacheConfig() if config is None else config
        check_choices(config, policy, streaming)
        check_config(model_config)
        check_made_for(policy, model_config)
        self.made_for = describe_model(model_config)
        self.config, self.policy = policy.configure(config), policy
        text_config = model_config.get_text_config(decoder=True)
        types = layer_types(text_config)
        compressed = [i for i, kind in enumerate(types) if kind == "full_attention"]
        head_room = min(max_new_tokens, MAX_HEAD_ROOM)
        self.contents = Contents(
            compressed, self.config, policy, backend, head_room, streaming, allocator
        )
        self._window, self._is_chunked = window_of(text_config)
        self._num_windows = self._num_states = 0
        layers: list[Any] = []
        for i, kind in enumerate(types):
            if i in compressed:
                layers.append(VLCacheLayer(self.contents, compressed.index(i)))
            elif kind in STATE_TYPES:
                num_parts = getattr(text_config, "number_of_conv_states", 1)
                layers.append(StateLayer(self.contents, num_parts))
                self._num_states += 1
            else:
                layers.append(WindowLayer(self.contents, self._num_windows, self._window))
                self._num_windows += 1
        super().__init__(layers=layers)
        self._forget_positions()

    def _forget_positions(self) -> None:
        self.position_ids: Tensor | None = None
        self.rope_deltas: Sequence[Tensor | None] = ()

    @property
    def _window_layers(self) -> list[WindowLayer]:
        return [layer for layer in self.layers if isinstance(layer, WindowLayer)]

    @property
    def _state_layers(self) -> list[StateLayer]:
        return [layer for layer in self.layers if isinstance(layer, StateLayer)]

    @property
    def prompt(self) -> Prompt | None:
        """The prompt that was announced last."""
        return self.contents.prompt

    @property
    def plan(self) -> CompressionPlan | None:
        """What compression has kept; None where nothing was compressed."""
        return self.contents.plan

    @property
    def packed(self) -> PackedCache | None:
        """What decode steps work on, once the prompt is packed."""
        return self.contents.packed

    @property
    def ragged(self) -> RaggedCache | None:
        """The compressed layers, once the prompt is packed."""
        return None if self.packed is None else self.packed.ragged

    @property
    def is_compressed(self) -> bool:
        """Whether the prompt has been compressed."""
        return self.plan is not None

    def report(self) -> CompressionReport | None:
        """What compression did; None where nothing was compressed."""
        return self.contents.report

    def begin(self, prompt: Prompt, num_past: int = 0) -> None:
        """Announce the prompt whose forward pass comes next; its first num_past tokens are all
        that is in the cache, whole."""
        if self.get_seq_length() != num_past or self.packed is not None:
            raise ValueError(
                f"cache: got {self.get_seq_length()} tokens in it, expected {num_past}"
            )
        self.contents.begin(prompt, num_past)

    def begin_step(
        self, num_rows: int, is_pad: Tensor | None = None, turn: Prompt | None = None
    ) -> None:
        """Announce a forward pass over the packed cache; arguments as `Contents.begin_step`."""
        assert self.packed is not None
        if is_pad is not None and self._num_states:
            raise NotImplementedError(
                "attention_mask: got pads among the rows of a later pass, expected none: layers"
                " with a state would take them in"
            )
        if is_pad is not None:  # Transformers' window layers would keep them, in place of tokens
            self._move_windows(self.packed, self.contents.allocator)
        self.contents.begin_step(num_rows, is_pad, turn)

    def end_pass(self) -> None:
        """Behind a forward pass, of the prompt or of later rows."""
        if self.packed is not None:
            if self.contents.allocator is not None:
                self._move_layers(self.packed, self.contents.allocator)
            self.packed.end_step()
            if self.contents.end_turn() is not None:
                self._use_states(self.packed)

    def pack_into(self, allocator: PoolAllocator) -> None:
        """Have prompts packed, even whole ones, in memory of this allocator; what is packed
        already (of a copy, of a cache from a file or from another block) moves there."""
        if self.contents.allocator is allocator:
            return
        if self.packed is not None:
            packed = self.contents.state = self.packed.copy_into(allocator)
            self._use_states(packed)
            self._move_layers(packed, allocator)
        self.contents.allocator, self.contents.packs_whole = allocator, True

    def _move_layers(self, packed: PackedCache, allocator: PoolAllocator) -> None:
        """Have what the prompt's pass has left in other layers where steps can read it."""
        self._move_windows(packed, allocator)
        if self._num_states and packed.states is None:
            tensors = [x for layer in self._state_layers for x in layer.tensors()]
            packed.states = allocator.attach(LayerStates, state_shapes(tensors), packed)
            packed.states.fill(tensors)
            self._use_states(packed)

    def _move_windows(self, packed: PackedCache, allocator: PoolAllocator | None) -> None:
        if not self._num_windows or packed.rings is not None:
            return
        rows: list[Any] = [(layer.keys, layer.values) for layer in self._window_layers]
        shape = RingShape(
            **kind_of(*rows[0]),
            num_layers=len(rows),
            num_seqs=rows[0][0].shape[0],
            num_kv_heads=rows[0][0].shape[1],
            window=self._window,
            is_chunked=self._is_chunked,
        )
        if allocator is None:
            packed.rings = WindowRings(shape)
        else:
            packed.rings = allocator.attach(WindowRings, shape, packed)
        packed.rings.fill(rows, packed.pads, packed.num_seen)
        for layer in self._window_layers:
            layer.keys = layer.values = None

    def _use_states(self, packed: PackedCache) -> None:
        """Have layers find their states where they have been moved to."""
        if packed.states is not None:
            tensors = iter(packed.states.tensors)
            for layer in self._state_layers:
                layer.move_to(tensors)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i what sequence beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        batch = self.packed or self.contents.prompt
        num_seqs = 0 if batch is None else len(batch.pads)
        self.rope_deltas = [
            x[indices.to(x.device)] if x is not None and len(x) == num_seqs else x
            for x in self.rope_deltas
        ]
        layers: list[Any] = self.layers
        if self.packed is not None:
            windows = self._window_layers if self.packed.rings is None else []
            states = self._state_layers if self.packed.states is None else []
            layers = [*windows, *states]
            self.packed.select_sequences(indices)
            self._use_states(self.packed)
        for layer in layers:
            layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.packed is None:
            super().batch_repeat_interleave(repeats)
        else:
            index = torch.arange(len(self.packed.pads)).repeat_interleave(repeats)
            self.batch_select_indices(index)

    def reset(self) -> None:
        """Empty; ready for another prompt."""
        layers: list[Any] = self.layers
        for layer in layers:
            if not isinstance(layer, StateLayer):  # Transformers 5.17 would append to zeros
                layer.keys = layer.values = None
                layer.is_initialized = False
        super().reset()
        self.contents.clear()
        self._forget_positions()

    def __copy__(self) -> None:
        """Refused: both would write to the same memory."""
        raise NotImplementedError("copy.copy: got a VLCache, expected copy.deepcopy")

    def activate_past_recording(self) -> None:
        """Refused: compression cannot be rolled back."""
        raise NotImplementedError("VLCache: got assisted decoding, expected plain decoding")
