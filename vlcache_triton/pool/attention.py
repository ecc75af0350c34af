"""Attention by torch where no kernel takes it: its own SDPA has no soft cap, and no sinks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipe.softmax import Softmax

ROWS_AT_ONCE = 256  # bounds the logits that exist at once


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax: Softmax
) -> Tensor:
    """Attention with all that `Softmax` says.

    Args:
        q: `[num_seqs, num_heads, n, d]`.
        k, v: `[num_seqs, num_kv_heads, n_k, d]` (`d_v` for v).
        mask: what rows see (bool), or what is added to the logits, scaled and capped; broadcasts to
            `[num_seqs, 1, n, n_k]`. None: causal, the last row sees all.

    Returns:
        `[num_seqs, num_heads, n, d_v]`.
    """
    num_seqs, num_heads, n, _ = q.shape
    num_kv_heads, n_k = k.shape[1:3]
    columns = torch.arange(n_k, device=q.device)
    parts = []
    for first in range(0, n, ROWS_AT_ONCE):
        rows = q[:, :, first : first + ROWS_AT_ONCE]
        num_rows = rows.shape[2]
        # The heads of a group as rows of one: no repeated K and V.
        grouped = rows.reshape(num_seqs, num_kv_heads, -1, q.shape[-1])
        logits = softmax.logits(grouped @ k.transpose(2, 3))
        logits = logits.view(num_seqs, num_heads, num_rows, n_k)
        if mask is None:
            last = torch.arange(first, first + num_rows, device=q.device)[:, None] + n_k - n
            part = columns <= last
        else:
            part = mask[:, :, first : first + ROWS_AT_ONCE]
        if part.dtype == torch.bool:
            logits = logits.masked_fill(~part, torch.finfo(logits.dtype).min)  # pads see none
        else:
            logits = logits + part
        weights = softmax.weights(logits).to(v.dtype).view(num_seqs, num_kv_heads, -1, n_k)
        parts.append((weights @ v).view(num_seqs, num_heads, num_rows, -1))
    return torch.cat(parts, 2)
