"""What is kept of a prompt: VL-Cache, and the published policies that it is compared with.

A policy is a scoring rule and an allocation rule, run by the same plan, kernels and ragged cache as
VL-Cache. All of them compress once, after prefill; where a paper also evicts while decoding (H2O,
StreamingLLM), that part is left out, so that every policy keeps the same number of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .config import VLCacheConfig

#: (post-vision rows, prompt length) -> how many of the last rows are the query rows.
QueryRows = Callable[[int, int], int]
#: How many query rows -> what the attention of each counts, `[rows]`, at least 0.
RowWeights = Callable[[int], Tensor]
#: Scores `[num_layers, num_kv_heads, length]` of one prompt, as measured, and which of its tokens
#: are visual, `[length]` bool, or None where that is not known -> scores as ranked.
Scoring = Callable[[Tensor, Tensor | None], Tensor]
#: Scores `[num_layers, num_kv_heads, length]` and tokens to keep a head `[num_layers]` on the host
#: -> tokens that each head keeps, `[num_layers, num_kv_heads]` on the host.
HeadSharing = Callable[[Tensor, Tensor], Tensor]

FIRST_RANK = 1e6  # above any sum of attention, and whole numbers from here on are exact in fp32


def _post_vision_rows(post_vision: int, length: int) -> int:
    return post_vision


@dataclass(frozen=True)
class Policy:
    """How the tokens of a prompt are ranked, and how its budget is shared out.

    Where its functions are a module's own, or partial ones of such, it can be pickled, and with it
    a cache that it has compressed.

    name: for tables.
    query_rows: the rows whose attention is measured, for scores and sparsity alike.
    score: what is done to the scores before tokens are ranked by them; None: nothing.
    share_heads: gives the KV heads of a layer different shares of its budget; None: even shares.
    choices: fields of VLCacheConfig that the policy sets, whatever the user's are.
    row_weights: what the query rows count in the scores; None: all alike.
    """

    name: str
    query_rows: QueryRows = _post_vision_rows
    score: Scoring | None = None
    share_heads: HeadSharing | None = None
    choices: Mapping[str, Any] = field(default_factory=dict)
    row_weights: RowWeights | None = None

    def configure(self, config: VLCacheConfig) -> VLCacheConfig:
        """The user's configuration with the fields that the policy sets."""
        return dataclasses.replace(config, **self.choices)


def vl_cache_policy() -> Policy:
    """VL-Cache (Tu et al., ICLR 2025): post-vision rows, layers by sparsity; all as configured."""
    return Policy("vl_cache")


def full() -> Policy:
    """The whole cache, whatever the budget."""
    return Policy("full", choices={"budget": 1.0})


def random_tokens(seed: int = 0) -> Policy:
    """Tokens drawn at random for each layer and head; a prompt of one length draws the same."""

    score = partial(_at_random, seed)
    return Policy("random", _last_rows(1), score, choices={"allocation": "uniform"})


def streaming_llm(sinks: int = 4) -> Policy:
    """StreamingLLM (Xiao et al., ICLR 2024): the first tokens, the sinks, and the most recent."""

    # At least one token is recent by configuration, so the sinks never take the whole budget.
    choices = {"allocation": "uniform", "recent_fraction": 0.0}
    return Policy("streaming_llm", _last_rows(1), partial(_ends, sinks), choices=choices)


def h2o() -> Policy:
    """H2O (Zhang et al., NeurIPS 2023): attention summed over all rows; half the budget recent."""
    choices = {"allocation": "uniform", "recent_fraction": 0.5}
    return Policy("h2o", _all_rows, choices=choices)


def snapkv(window: int = 32, pool: int = 5) -> Policy:
    """SnapKV (Li et al., NeurIPS 2024): the last `window` rows score, smoothed over `pool`
    neighbours; the window itself is kept."""
    choices = {"allocation": "uniform", "smoothing": pool}
    return Policy("snapkv", _last_rows(window), _keep_window(window), choices=choices)


def pyramidkv(window: int = 8, pool: int = 7) -> Policy:
    """PyramidKV (Cai et al., 2024): SnapKV's scores, budgets that fall linearly with depth
    (β = 20)."""
    choices = {"allocation": "pyramid", "smoothing": pool}
    return Policy("pyramidkv", _last_rows(window), _keep_window(window), choices=choices)


def adakv(window: int = 32, pool: int = 7, safeguard: float = 0.2) -> Policy:
    """Ada-SnapKV (Feng et al., NeurIPS 2025): SnapKV's scores; the heads of a layer share its
    budget by their scores, each having `safeguard` of its even share for certain."""
    share_heads = partial(adaptive_heads, safeguard=safeguard)
    choices = {"allocation": "uniform", "smoothing": pool}
    return Policy("adakv", _last_rows(window), _keep_window(window), share_heads, choices)


def hindsight(attention: Tensor) -> Policy:
    """The oracle: ranks tokens by what decoding did attend to, which no policy can know.

    Layers share the budget as configured; one token, the last, is kept for being recent.

    Args:
        attention: `[num_layers, num_kv_heads, length]` fp32, the attention that the prompt's
            tokens received from the answer's rows with the full cache. Of one prompt.
    """
    score = partial(_as_attended, attention)
    return Policy("hindsight", score=score, choices={"recent_fraction": 0.0})


def adaptive_heads(scores: Tensor, keep: Tensor, safeguard: float) -> Tensor:
    """Tokens for each head of a layer: those that the layer's highest scores belong to (Ada-KV,
    Algorithm 1), and at least `safeguard` of the even share.

    Args:
        scores: `[num_layers, num_kv_heads, length]`.
        keep: `[num_layers]` int64 on the host, the even share.

    Returns:
        int64 `[num_layers, num_kv_heads]` on the host, whose rows sum to keep * num_kv_heads.
        Cost: a sort and a host sync.
    """
    num_heads, length = scores.shape[1:]
    device = scores.device
    certain = (safeguard * keep).floor().long().to(device)[:, None, None]
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(length, device=device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, rank)  # of each token within its head
    flat = scores.masked_fill(rank < certain, torch.inf).flatten(1)
    head = flat.sort(dim=-1, descending=True, stable=True).indices // length
    is_taken = torch.arange(flat.shape[1], device=device) < (keep * num_heads).to(device)[:, None]
    counts = torch.zeros(scores.shape[:2], dtype=torch.int64, device=device)
    return counts.scatter_add_(1, head, is_taken.long()).cpu()


def _all_rows(post_vision: int, length: int) -> int:
    return length


def _last_rows(n: int) -> QueryRows:
    return partial(_at_most, n)


def _at_most(n: int, post_vision: int, length: int) -> int:
    return min(n, length)


def _at_random(seed: int, scores: Tensor, is_visual: Tensor | None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(scores.shape, generator=generator).to(scores.device)


def _ends(sinks: int, scores: Tensor, is_visual: Tensor | None) -> Tensor:
    position = torch.arange(scores.shape[-1], dtype=scores.dtype, device=scores.device)
    position[:sinks] = torch.inf
    return position.expand_as(scores)


def _as_attended(attention: Tensor, scores: Tensor, is_visual: Tensor | None) -> Tensor:
    if scores.shape != attention.shape:
        raise ValueError(
            f"attention: got shape {tuple(attention.shape)}, expected {tuple(scores.shape)}"
            " (num_layers, num_kv_heads, length), of the prompt that is compressed"
        )
    return attention.to(scores.device)


def _keep_window(window: int) -> Scoring:
    """The last `window` tokens outrank the others, the latest first."""
    return partial(_window_first, window)


def _window_first(window: int, scores: Tensor, is_visual: Tensor | None) -> Tensor:
    first = max(scores.shape[-1] - window, 0)
    ranks = FIRST_RANK + torch.arange(scores.shape[-1] - first, device=scores.device)
    return torch.cat([scores[..., :first], ranks.to(scores).expand_as(scores[..., first:])], -1)


VL_CACHE = vl_cache_policy()
#: What the evaluation compares; the hindsight oracle is made for each prompt.
POLICIES = (
    VL_CACHE,
    random_tokens(),
    streaming_llm(),
    h2o(),
    snapkv(),
    pyramidkv(),
    adakv(),
    full(),
)
