"""Shares of the budget by scores: within a layer, or over all layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..budgets import share_out
from .policy import PromptStatistics


def adaptive_heads(
    scores: Tensor, keep: Tensor, safeguard: float = 0.0, *, across_layers: bool = False
) -> Tensor:
    """Tokens for each head: those that the highest scores of its layer belong to (Ada-KV,
    Algorithm 1), or of all layers; and at least `safeguard` of the even share.

    Args:
        scores: `[num_layers, num_kv_heads, length]`.
        keep: `[num_layers]` int64 on the host, the even share.

    Returns:
        int64 `[num_layers, num_kv_heads]` on the host, whose rows sum to keep * num_kv_heads, or
        all together do. Cost: a sort and a host sync.
    """
    num_layers, num_heads, length = scores.shape
    device = scores.device
    certain = (safeguard * keep).floor().long().to(device)[:, None, None]
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(length, device=device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, rank)  # of each token within its head
    competing = scores.masked_fill(rank < certain, torch.inf).flatten(1)
    totals = keep * num_heads
    if across_layers:
        competing, totals = competing.view(1, -1), totals.sum(0, keepdim=True)
    head = competing.sort(dim=-1, descending=True, stable=True).indices // length
    is_taken = torch.arange(competing.shape[1], device=device) < totals.to(device)[:, None]
    counts = torch.zeros(len(head), head.shape[1] // length, dtype=torch.int64, device=device)
    return counts.scatter_add_(1, head, is_taken.long()).view(num_layers, num_heads).cpu()


def by_scores(scores: Tensor, statistics: PromptStatistics, keep: Tensor, **options: Any) -> Tensor:
    """`Policy.share_heads`, by adaptive_heads and its options."""
    return adaptive_heads(scores, keep, **options)


def layers_by(weights: Tensor, keep: Tensor, num_heads: int, length: int) -> Tensor:
    """Tokens for each head, the same for those of a layer: layers by `weights` `[num_layers]`, at
    least 1 token; all together as many as `keep` `[num_layers]` on the host says.

    Returns:
        int64 `[num_layers, num_kv_heads]` on the host. Cost: a host sync.
    """
    least = min(1, length, int(keep.min()))
    by_layer = share_out(weights.cpu(), int(keep.sum()), least, length)
    return by_layer[:, None].expand(-1, num_heads)
