"""The layers of a VLCache: those that are compressed, and those with a window or a state."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from vlcache_triton.recipe.prompt import Prompt
from vlcache_triton.recipe.softmax import Softmax

from .contents import Contents, Empty


# Transformers tells its attention and mask functions nothing of the cache. What the layers hand to
# them does: keys lead to their layer (`layer_of`), and the number of keys has a type that says
# whether a prompt is being read. Nothing else is hidden, and nothing has to be taken back.
class PromptLength(int):
    """The number of keys that a layer reports to the mask function while it reads a prompt."""


class ContentsLayer:
    """A layer of a VLCache, whose contents say what state it is in; `index` counts the layers of a
    kind. The attention function finds it on the key tensor that `update` returns (`layer_of`)."""

    is_croppable = False
    contents: Contents
    index: int

    @property
    def prompt(self) -> Prompt | None:
        """The prompt that is being read, if one is."""
        reading = self.contents.reading
        return None if reading is None else reading.prompt

    def check_mask(self, mask: Tensor) -> None:
        """Refuse a mask or bias that a language model hands to its attention, where compression
        would not know of it. (Boolean ones of a prompt are Transformers' own, such as Gemma3's,
        whose images see all of themselves.)"""
        is_packed = self.contents.packed is not None
        if is_packed or (self.contents.reading is not None and mask.dtype != torch.bool):
            raise NotImplementedError(
                f"attention_mask: got {mask.dtype} {list(mask.shape)} in the attention of a layer"
                f" {'that is compressed' if is_packed else 'to be compressed'},"
                " expected None: VL-Cache has no additive bias and no mask"
            )

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


class VLCacheLayer(ContentsLayer, DynamicLayer):
    """A full-attention layer: the ones that are compressed."""

    def __init__(self, contents: Contents, index: int) -> None:
        super().__init__()
        self.contents, self.index = contents, index

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Store a step's K and V `[num_seqs, num_kv_heads, n, d]`; what to attend to comes back."""
        packed = self.contents.packed
        if packed is not None:
            packed.check_rows(key_states.shape[2])
            k, v = packed.in_order(key_states), packed.in_order(value_states)
            packed.ragged.append(self.index, k, v, packed.step_pads)
            return _tagged(key_states, self), value_states
        if isinstance(self.contents.state, Empty):
            raise RuntimeError(
                "VLCache: got rows of a prompt that nobody announced, expected a forward pass"
                " inside a vl_cache block"
            )
        if self.contents.reading is None or self.keys is not None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return _tagged(keys, self), values
        # Borrowed, not copied: compression soon takes what it keeps.
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states, value_states
        return _tagged(key_states, self), value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor | None:
        """Attention over the packed cache `[num_seqs, n, num_heads, d_v]`; None before."""
        packed = self.contents.packed
        if packed is None:
            return None
        query = packed.in_order(query)
        if self.contents.turn is not None:
            self.contents.measure_turn(self.index, query, softmax)
        return packed.as_read(packed.ragged.attend(self.index, query, softmax))

    def observe(self, query: Tensor, softmax: Softmax) -> None:
        """Hand K, V and query rows of the prompt that is being read to compression."""
        assert self.keys is not None and self.values is not None and self.prompt is not None
        if self.keys.shape[2] != self.prompt.padded_length:
            raise NotImplementedError(
                f"model: got {self.keys.shape[2]} rows for a prompt of {self.prompt.padded_length}"
                " tokens, expected as many: its forward pass leaves tokens out, or puts some in,"
                " so that where images lie cannot be known"
            )
        # By row, as projections and RoPE leave them behind: views.
        k, v = (x.detach().transpose(1, 2).flatten(0, 1) for x in (self.keys, self.values))
        self.keys = self.values = None
        self.contents.add_layer(k, v, query, softmax)

    def get_seq_length(self) -> Any:
        """Tokens seen, not tokens kept: positions go on from here. During a step of a model with
        windows a scalar on the device: Llama4's layers scale by it, also when captured."""
        packed, reading = self.contents.packed, self.contents.reading
        if packed is not None:
            if packed.rings is not None and packed.step_rows > 0:
                return packed.rings.seen
            return packed.num_seen
        if self.keys is None:  # nothing yet, or handed over
            return 0 if reading is None else reading.num_past
        return super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(0, 0) once packed, for which the mask function makes no mask."""
        if self.contents.packed is not None:
            return 0, 0
        length = self.get_seq_length() + query_length
        return (length if self.contents.reading is None else PromptLength(length)), 0


class WindowLayer(ContentsLayer, DynamicSlidingWindowLayer):
    """A sliding or chunked layer: not compressed. As Transformers makes it, until the prompt has
    been packed for captured steps; then in `WindowRings`."""

    def __init__(self, contents: Contents, index: int, window: int) -> None:
        super().__init__(window)
        self.contents, self.index = contents, index

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Store a step's K and V `[num_seqs, num_kv_heads, n, d]`; what to attend to comes back."""
        packed = self.contents.packed
        if packed is None or packed.rings is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            kept = self.keys, self.values
            assert kept[0] is not None and kept[1] is not None
            if 2 * kept[0].shape[2] <= keys.shape[2]:  # views, which would keep all of a prompt
                self.keys, self.values = kept[0].clone(), kept[1].clone()
            return keys, values
        packed.check_rows(key_states.shape[2])
        k, v = packed.in_order(key_states), packed.in_order(value_states)
        keys, values = packed.rings.append(self.index, k, v)
        return _tagged(keys, self), values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        """Attention within the window `[num_seqs, n, num_heads, d_v]`."""
        packed = self.contents.packed
        assert packed is not None and packed.rings is not None
        query = packed.in_order(query)
        return packed.as_read(packed.rings.attend(query, key, value, softmax))

    def get_seq_length(self) -> int:
        """Tokens seen: positions go on from here."""
        packed = self.contents.packed
        if packed is None or packed.rings is None:
            return super().get_seq_length()
        return packed.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(0, 0) for a ring, whose mask is its own."""
        packed = self.contents.packed
        if packed is None or packed.rings is None:
            return super().get_mask_sizes(query_length)
        return 0, 0


class StateLayer(ContentsLayer, LinearAttentionLayer):
    """A linear, convolution or Mamba layer: a state of constant size, which Transformers changes
    in place. Its own, until the prompt has been packed for captured steps; then in `LayerStates`.
    Blocks without a cache, which some models count as layers, have no state ever."""

    def __init__(self, contents: Contents, number_of_states: int = 1) -> None:
        super().__init__(number_of_states)
        self.contents = contents

    def tensors(self) -> list[Tensor]:
        """The states `[num_seqs, ...]`, once a pass has made them."""
        return [states[i] for states, i in self._places()]

    def move_to(self, tensors: Iterator[Tensor]) -> None:
        """Have the states in the next of these tensors from now on, which hold them already."""
        for states, i in self._places():
            states[i] = next(tensors)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make sequence i what sequence indices[i] was; new tensors."""
        for states, i in self._places():
            states[i] = states[i][indices.to(states[i].device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence; new tensors."""
        for states, i in self._places():
            states[i] = states[i].repeat_interleave(repeats, 0)

    def reset(self) -> None:
        """Empty, for a batch of any size: Transformers would keep the tensors."""
        LinearAttentionLayer.__init__(self, self.number_of_states)

    def _places(self) -> Iterator[tuple[dict[int, Any], int]]:
        for states in (self.conv_states, self.recurrent_states):
            for i, state in states.items():
                if state is not None:
                    yield states, i


def _tagged(key: Tensor, layer: ContentsLayer) -> Tensor:
    """A view of key that leads the attention function to its cache layer.

    A view, as the layer holds the tensor itself; and weakly, as a tensor that outlives the pass
    would keep the cache's memory.
    """
    view = key.view_as(key)
    view.vlcache_layer = weakref.ref(layer)  # type: ignore[attr-defined]
    return view


def layer_of(key: Tensor) -> Any:
    """The layer whose `update` has returned these keys; None of others."""
    return getattr(key, "vlcache_layer", lambda: None)()
