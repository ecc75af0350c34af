"""The layers of a VLCache: those that are compressed, and those that have a window."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from .cache import VLCache


class OwnedLayer:
    """A layer of a VLCache. The attention function finds it on the key tensor it is handed."""

    is_croppable = False

    def belong_to(self, owner: VLCache, index: int) -> None:
        """Weakly, so that a cache that is dropped frees its memory at once; `index` counts the
        layers of a kind."""
        self._owner = weakref.ref(owner)
        self.index = index

    def __getstate__(self) -> dict[str, Any]:
        """Without the owner: who copies or loads a layer says whose it is."""
        return {name: x for name, x in vars(self).items() if name != "_owner"}

    @property
    def owner(self) -> VLCache:
        """The cache that this is a layer of."""
        owner = self._owner()
        if owner is None:
            raise RuntimeError("VLCacheLayer: its VLCache is gone, expected it to be kept alive")
        return owner

    def check_mask(self, mask: Tensor) -> None:
        """Refuse a mask or bias that a language model hands to its attention, where compression
        would not know of it. (Boolean ones of a prompt are Transformers' own, such as Gemma3's,
        whose images see all of themselves.)"""
        owner = self.owner
        if owner.ragged is not None or (owner.will_pack and mask.dtype != torch.bool):
            raise NotImplementedError(
                f"attention_mask: got {mask.dtype} {list(mask.shape)} in the attention of a layer"
                f" {'that is compressed' if owner.ragged is not None else 'to be compressed'},"
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


class VLCacheLayer(OwnedLayer, DynamicLayer):
    """A full-attention layer: the ones that are compressed."""

    def __init__(self, owner: VLCache, index: int) -> None:
        super().__init__()
        self.belong_to(owner, index)

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
        if not owner.will_pack or self.keys is not None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return _tagged(keys, self), values
        # Borrowed, not copied: compression soon takes what it keeps.
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states, value_states
        return _tagged(key_states, self), value_states

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float
    ) -> Tensor | None:
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

    def get_seq_length(self) -> Any:
        """Tokens seen, not tokens kept: positions go on from here. During a step of a model with
        windows a scalar on the device: Llama4's layers scale by it, also when captured."""
        owner = self.owner
        if owner.windows is not None and owner.is_in_step:
            return owner.windows.seen
        return owner.num_seen if self.keys is None else super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(0, 0) once compressed, for which the mask function makes no mask."""
        is_ragged = self.owner.ragged is not None
        return (0, 0) if is_ragged else (self.get_seq_length() + query_length, 0)


class WindowLayer(OwnedLayer, DynamicSlidingWindowLayer):
    """A sliding or chunked layer: not compressed. As Transformers makes it, until the prompt has
    been packed for captured steps; then in `WindowRings`."""

    def __init__(self, owner: VLCache, index: int, window: int) -> None:
        super().__init__(window)
        self.belong_to(owner, index)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Store a step's K and V `[num_seqs, num_kv_heads, n, d]`; what to attend to comes back."""
        owner = self.owner
        if owner.windows is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            kept = self.keys, self.values
            assert kept[0] is not None and kept[1] is not None
            if 2 * kept[0].shape[2] <= keys.shape[2]:  # views, which would keep all of a prompt
                self.keys, self.values = kept[0].clone(), kept[1].clone()
            return keys, values
        owner.check_step(key_states.shape[2])
        keys, values = owner.windows.append(self.index, key_states, value_states)
        return _tagged(keys, self), values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Tensor:
        """Attention within the window `[num_seqs, n, num_heads, d_v]`."""
        windows = self.owner.windows
        assert windows is not None
        return windows.attend(query, key, value, softmax_scale)

    def get_seq_length(self) -> int:
        """Tokens seen: positions go on from here."""
        return super().get_seq_length() if self.owner.windows is None else self.owner.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(0, 0) for a ring, whose mask is its own."""
        return (0, 0) if self.owner.windows is not None else super().get_mask_sizes(query_length)


def _tagged(key: Tensor, layer: OwnedLayer) -> Tensor:
    """A view of key that carries its cache layer to the attention function.

    A view, as the layer holds the tensor itself: a tag on that would keep both alive in a cycle.
    """
    view = key.view_as(key)
    view.vlcache_layer = layer  # type: ignore[attr-defined]
    return view
