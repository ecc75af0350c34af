"""What stands between the products of queries and keys and the weights of attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Softmax(NamedTuple):
    """A layer's own, as the kernels have arguments of these names.

    softcap: above 0, logits are tanh(logits / softcap) * softcap, as Gemma2's.
    sinks: `[num_heads]`, or `[n, num_heads]` whose row i % n is of sequence i: the logit of each
        head that no key stands for, as gpt-oss learns them; neither scaled nor capped. What it
        takes of a row's weights goes to nothing.
    """

    softmax_scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's scaled_dot_product_attention has all of it."""
        return self.softcap == 0 and self.sinks is None

    def by_kv_head(self, num_kv_heads: int) -> Softmax:
        """Of segments ordered by sequence, then KV head, with the heads of a group each."""
        if self.sinks is None:
            return self
        return self._replace(sinks=self.sinks.view(num_kv_heads, -1))

    def logits(self, products: Tensor) -> Tensor:
        """fp32, of products of queries and keys."""
        logits = products.float() * self.softmax_scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap > 0 else logits

    def weights(self, logits: Tensor) -> Tensor:
        """Of keys, for logits `[num_seqs, num_heads, rows, keys]`; NaN in a row that sees none and
        has no sink."""
        if self.sinks is None:
            return logits.softmax(-1)
        num_seqs, num_heads, rows, _ = logits.shape
        sinks = self.sinks.to(logits).view(-1, num_heads)
        sinks = sinks.repeat(num_seqs // len(sinks), 1)[..., None, None]
        return torch.cat([logits, sinks.expand(-1, -1, rows, -1)], -1).softmax(-1)[..., :-1]
