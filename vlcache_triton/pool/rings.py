"""K and V of layers with a window, in rings of fixed size: captured steps read them where they are.

Transformers' own window layers hold a new tensor after every step, which no capture survives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .shape import RingShape
from .softcap import capped_attention

SPARE = 16  # slots beyond the window: so many steps at most can be taken back


class WindowRings:
    """The last tokens of all sliding or chunked layers of one cache.

    The token at padded position p lies in slot p % num_slots of every layer. Memory:
    window + SPARE tokens a layer, whatever has been seen. All layers share the positions and the
    mask, which `advance` sets once a forward pass.

    k, v: `[num_layers, num_seqs, num_kv_heads, num_slots, d]`.
    seen: int64 scalar, tokens before the running pass, pads included.
    """

    def __init__(self, shape: RingShape) -> None:
        self.shape, device, num_seqs = shape, shape.device, shape.num_seqs
        num_slots = shape.window + SPARE
        sizes = shape.num_layers, num_seqs, shape.num_kv_heads, num_slots
        self.k = torch.zeros(*sizes, shape.head_size, dtype=shape.dtype, device=device)
        self.v = torch.zeros(*sizes, shape.v_head_size, dtype=shape.dtype, device=device)
        self.seen = torch.zeros((), dtype=torch.long, device=device)
        self._positions = torch.full((num_slots,), -1, device=device)  # what each slot holds
        self._pads = torch.zeros(num_seqs, dtype=torch.long, device=device)
        self._one_slot = torch.zeros(1, dtype=torch.long, device=device)
        self._one_row_mask = torch.zeros(num_seqs, 1, 1, num_slots, dtype=torch.bool, device=device)
        self._slots, self._mask = self._one_slot, self._one_row_mask

    def fill(
        self, layers: Sequence[tuple[Tensor, Tensor]], pads: Sequence[int], num_seen: int
    ) -> None:
        """Begin with the last rows of a prompt: of each layer, k and v
        `[num_seqs, num_kv_heads, n, d]`, n at most the window."""
        device = self.k.device
        positions = torch.arange(num_seen - layers[0][0].shape[2], num_seen, device=device)
        slots = positions % len(self._positions)
        self._positions.fill_(-1)
        self._positions[slots] = positions
        self._pads.copy_(torch.tensor(pads))
        # An empty slot has no weight, but it must be finite.
        self.k.zero_()
        self.v.zero_()
        for layer, (k, v) in enumerate(layers):
            self.k[layer, :, :, slots] = k
            self.v[layer, :, :, slots] = v

    def copy_from(self, other: WindowRings) -> None:
        """Become a copy of others of the same sizes, in place; between passes."""
        for name in ("k", "v", "_positions", "_pads"):
            getattr(self, name).copy_(getattr(other, name))

    def advance(self, num_seen: int, n: int) -> None:
        """Announce a pass of n rows a sequence, behind num_seen tokens. No sync.

        Of one row, it changes memory that stays in place: a captured pass finds it there.
        """
        self.seen.fill_(num_seen)
        rows = torch.arange(num_seen, num_seen + n, device=self.seen.device)
        last = rows[-len(self._positions) :]
        slots = last % len(self._positions)
        columns = self._positions
        if n > 1:
            columns = torch.cat([columns, rows])
        self._positions.index_copy_(0, slots, last)
        mask = self._sees(rows, columns)
        if n > 1:
            self._slots, self._mask = slots, mask
        else:
            self._slots, self._mask = self._one_slot, self._one_row_mask
            self._slots.copy_(slots)
            self._mask.copy_(mask)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the pass's rows k, v `[num_seqs, num_kv_heads, n, d]`; what comes back is what
        they attend to."""
        old_k, old_v = self.k[layer], self.v[layer]
        keys, values = old_k, old_v
        if k.shape[2] > 1:  # before the first of them fall out of the ring
            keys, values = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        last = len(self._slots)
        old_k.index_copy_(2, self._slots, k[:, :, -last:])
        old_v.index_copy_(2, self._slots, v[:, :, -last:])
        return keys, values

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, softcap: float = 0.0
    ) -> Tensor:
        """Attention of the pass's rows q `[num_seqs, num_heads, n, d]` over what `append` gave.

        Returns `[num_seqs, n, num_heads, d_v]`.
        """
        if softcap > 0:
            out = capped_attention(q, k, v, self._mask, softmax_scale, softcap)
            return out.transpose(1, 2).contiguous()
        num_seqs, num_heads, n, d = q.shape
        num_kv_heads = k.shape[1]
        group = num_heads // num_kv_heads
        # The heads of a group as rows of one: no repeated K and V.
        rows = q.reshape(num_seqs, num_kv_heads, group * n, d)
        mask = self._mask.repeat(1, 1, group, 1)
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=softmax_scale)
        return out.reshape(num_seqs, num_heads, n, -1).transpose(1, 2).contiguous()

    def take_back(self, num_seen: int) -> None:
        """Forget the tokens from num_seen on, the last SPARE at most."""
        self._positions.masked_fill_(self._positions >= num_seen, -1)

    def select_sequences(self, indices: Tensor) -> None:
        """Make sequence i what sequence indices[i] was; new tensors."""
        indices = indices.to(self.k.device)
        self.shape = dataclasses.replace(self.shape, num_seqs=len(indices))
        self.k, self.v = self.k[:, indices], self.v[:, indices]
        self._pads = self._pads[indices]
        self._one_row_mask = self._one_row_mask[indices]

    def _sees(self, rows: Tensor, columns: Tensor) -> Tensor:
        """`[num_seqs, 1, rows, columns]` bool, for positions of rows and of what columns hold."""
        row, column, pad = rows[:, None], columns, self._pads[:, None, None, None]
        window = self.shape.window
        if self.shape.is_chunked:
            is_near = (column - pad) // window == (row - pad) // window
        else:
            is_near = column > row - window
        return is_near & (column <= row) & (column >= pad)
