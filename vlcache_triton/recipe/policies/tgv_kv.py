"""TGV-KV (https://arxiv.org/abs/2606.03075, https://github.com/Danielement321/TGV-KV)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .policy import Policy, PromptStatistics, post_vision_rows
from .sharing import layers_by
from .visual import text_first, visual_tokens


def tgv_kv(sinks: int = 4) -> Policy:
    """TGV-KV (ICML 2026): visual tokens by the attention of the text rows behind the image, each
    row weighed by the attention that its own token gets from text; text before anything visual;
    layers by the attention that text pays to the image. One set of tokens for the heads of a layer.

    The first `sinks` tokens and the last are kept. Where not even the text fits, the published
    code ranks it by the attention of all rows; here, by that of the rows behind the image.
    """
    return Policy(
        "tgv_kv",
        score=partial(_grounded, sinks),
        share_heads=_by_interaction,
        choices={
            "allocation": "uniform",
            "granularity": "layer",
            "row_reduction": "sum",
            "group_reduction": "mean",
            "recent_fraction": 0.0,
            "smoothing": 1,
        },
        row_weights=_mean_attention,
        guide_rows=post_vision_rows,
    )


def _mean_attention(rows: int, guide: Tensor | None) -> Tensor:
    """Text-Weighted Ranking: the mean over the rows that see the token, which of the first are all
    `rows` and of the last is one."""
    assert guide is not None
    return guide / torch.arange(rows, 0, -1, device=guide.device)


def _grounded(sinks: int, statistics: PromptStatistics) -> Tensor:
    scores = text_first(statistics)
    scores[..., :sinks] = torch.inf
    return scores


def _by_interaction(scores: Tensor, statistics: PromptStatistics, keep: Tensor) -> Tensor:
    """Text-Vision Budgeting."""
    assert statistics.guide is not None
    to_image = statistics.guide.mean(1)[:, visual_tokens(statistics)].sum(-1)
    return layers_by(to_image, keep, *scores.shape[1:])
