"""K and V of layers with a window, in rings of fixed size: captured steps read them where they are.

Transformers' own window layers hold a new tensor after every step, which no capture survives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recipe.softmax import Softmax
from .attention import torch_attention
from .shape import RingShape

SPARE = 16  # slots beyond the window: so many steps at most can be taken back


class WindowRings:
    """The last tokens of all sliding or chunked layers of one cache.

    A sequence's token at position p, pads not counted, lies in slot p % num_slots of every layer;
    one slot more takes pads, and is never seen. Memory: window + SPARE + 1 tokens a layer, whatever
    has been seen. All layers share the positions and the mask, which `advance` sets once a forward
    pass.

    k, v: `[num_layers, num_seqs, num_kv_heads, num_slots + 1, d]`.
    seen: int64 scalar, tokens before the running pass, pads included.
    """

    def __init__(self, shape: RingShape) -> None:
        self.shape, device, num_seqs = shape, shape.device, shape.num_seqs
        self.num_slots = shape.window + SPARE
        sizes = shape.num_layers, num_seqs, shape.num_kv_heads, self.num_slots + 1
        self.k = torch.zeros(*sizes, shape.head_size, dtype=shape.dtype, device=device)
        self.v = torch.zeros(*sizes, shape.v_head_size, dtype=shape.dtype, device=device)
        self.seen = torch.zeros((), dtype=torch.long, device=device)
        # What each slot holds, -1 for nothing; the position of each sequence's next token.
        self._positions = torch.full((num_seqs, self.num_slots + 1), -1, device=device)
        self._next = torch.zeros(num_seqs, dtype=torch.long, device=device)
        self._one_slot = torch.zeros(num_seqs, 1, dtype=torch.long, device=device)
        self._one_row_mask = torch.zeros(
            num_seqs, 1, 1, self.num_slots + 1, dtype=torch.bool, device=device
        )
        self._slots, self._mask = self._one_slot, self._one_row_mask

    def fill(
        self, layers: Sequence[tuple[Tensor, Tensor]], pads: Sequence[int], num_seen: int
    ) -> None:
        """Begin with the last rows of a prompt: of each layer, k and v
        `[num_seqs, num_kv_heads, n, d]`, n at most the window."""
        self._positions.fill_(-1)
        # An empty slot has no weight, but it must be finite.
        self.k.zero_()
        self.v.zero_()
        n = layers[0][0].shape[2]
        self._next.copy_(num_seen - n - torch.tensor(pads))
        self._slots = self._place(torch.zeros_like(self._next), n)
        for layer, (k, v) in enumerate(layers):
            self._store(layer, k, v)

    def copy_from(self, other: WindowRings) -> None:
        """Become a copy of others of the same sizes, in place; between passes."""
        for name in ("k", "v", "_positions", "_next"):
            getattr(self, name).copy_(getattr(other, name))

    def advance(self, num_seen: int, n: int, pads: Tensor | None = None) -> None:
        """Announce a pass of n rows a sequence, behind num_seen tokens. No sync.

        Of one row, it changes memory that stays in place: a captured pass finds it there.

        Args:
            pads: `[num_seqs]` int64, how many of each sequence's rows, the first ones, are pads.
        """
        self.seen.fill_(num_seen)
        pads = torch.zeros_like(self._next) if pads is None else pads
        rows = self._next[:, None] + torch.arange(n, device=self.seen.device) - pads[:, None]
        is_pad = rows < self._next[:, None]
        # Several rows also see what they push out of the ring.
        columns = torch.cat([self._positions, rows.masked_fill(is_pad, -1)], 1)
        slots = self._place(pads, n)
        columns = columns if n > 1 else self._positions
        # Pads see everything, so that what they give is finite.
        mask = (self._sees(rows, columns) | is_pad[..., None])[:, None]
        if n > 1:
            self._slots, self._mask = slots, mask
        else:
            self._slots, self._mask = self._one_slot, self._one_row_mask
            self._slots.copy_(slots)
            self._mask.copy_(mask)

    def _place(self, pads: Tensor, n: int) -> Tensor:
        """Give n rows more, the first of which are pads `[num_seqs]`, their positions: the slots of
        the last ones, `[num_seqs, n]` or fewer."""
        rows = self._next[:, None] + torch.arange(n, device=pads.device) - pads[:, None]
        is_none = (rows < self._next[:, None]) | (rows < 0)  # pads, or the prompt's
        last = rows[:, -self.num_slots :]
        is_none = is_none[:, -self.num_slots :]
        slots = (last % self.num_slots).masked_fill(is_none, self.num_slots)
        self._positions.scatter_(1, slots, last.masked_fill(is_none, -1))
        self._next += n - pads
        return slots

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the pass's rows k, v `[num_seqs, num_kv_heads, n, d]`; what comes back is what
        they attend to."""
        keys, values = self.k[layer], self.v[layer]
        if k.shape[2] > 1:  # before the first of them fall out of the ring
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        self._store(layer, k, v)
        return keys, values

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        slots = self._slots[:, None, :, None]
        for ring, x in ((self.k[layer], k), (self.v[layer], v)):
            last = x[:, :, -slots.shape[2] :]
            ring.scatter_(2, slots.expand_as(last), last)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
        """Attention of the pass's rows q `[num_seqs, num_heads, n, d]` over what `append` gave.

        Returns `[num_seqs, n, num_heads, d_v]`.
        """
        if not softmax.is_plain:
            out = torch_attention(q, k, v, self._mask, softmax)
            return out.transpose(1, 2).contiguous()
        num_seqs, num_heads, n, d = q.shape
        num_kv_heads = k.shape[1]
        group = num_heads // num_kv_heads
        # The heads of a group as rows of one: no repeated K and V.
        rows = q.reshape(num_seqs, num_kv_heads, group * n, d)
        mask = self._mask.repeat(1, 1, group, 1)
        scale = softmax.softmax_scale
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        return out.reshape(num_seqs, num_heads, n, -1).transpose(1, 2).contiguous()

    def take_back(self, num_rows: int) -> None:
        """Forget the last tokens of every sequence, SPARE at most."""
        self._next -= num_rows
        self._positions.masked_fill_(self._positions >= self._next[:, None], -1)

    def select_sequences(self, indices: Tensor) -> None:
        """Make sequence i what sequence indices[i] was; new tensors."""
        indices = indices.to(self.k.device)
        self.shape = dataclasses.replace(self.shape, num_seqs=len(indices))
        self.k, self.v = self.k[:, indices], self.v[:, indices]
        self._positions, self._next = self._positions[indices], self._next[indices]
        self._one_slot = self._one_slot[indices]
        self._one_row_mask = self._one_row_mask[indices]

    def _sees(self, rows: Tensor, columns: Tensor) -> Tensor:
        """`[num_seqs, rows, columns]` bool, for positions of rows `[num_seqs, n]` and of what
        columns hold."""
        row, column, window = rows[..., None], columns[:, None], self.shape.window
        if self.shape.is_chunked:
            is_near = column // window == row // window
        else:
            is_near = column > row - window
        return is_near & (column <= row) & (column >= 0)
