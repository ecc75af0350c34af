"""AirCache (https://arxiv.org/abs/2503.23956); its authors have published no code."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .policy import Policy, PromptStatistics
from .rows import last_rows
from .sharing import layers_by
from .visual import text_first, visual_tokens


def aircache(relevance: float = 0.9) -> Policy:
    """AirCache (Huang et al., ICCV 2025): visual tokens by the attention of the elite rows alone:
    those behind the image whose own token gets at least `relevance` of the most that the last row
    pays to one of them. Text is kept before anything visual. What is left goes to layers by the
    strength of their attention to the image, and by how skewed it is over its tokens.

    Rows are chosen once for the heads of a layer, by their mean. Attention is over all keys, as the
    model's; the paper computes it anew over those of the image and the elite tokens.
    """
    return Policy(
        "aircache",
        score=text_first,
        share_heads=_by_strength_and_skewness,
        choices={
            "allocation": "uniform",
            "row_reduction": "sum",
            "group_reduction": "mean",
            "recent_fraction": 0.0,
        },
        row_weights=partial(_elite, relevance),
        guide_rows=last_rows(1),
    )


def _elite(relevance: float, rows: int, guide: Tensor | None) -> Tensor:
    """1 / n for each of the n elite rows (eq. 5), so that their attention is averaged."""
    assert guide is not None
    elite = (guide >= relevance * guide.max()).float()
    return elite / elite.sum()


def _by_strength_and_skewness(scores: Tensor, statistics: PromptStatistics, keep: Tensor) -> Tensor:
    """Half by each, both relative to their mean over the layers; text is every layer's."""
    visual = visual_tokens(statistics)
    importance = statistics.attention.mean(1)[:, visual].double()  # [num_layers, visual]
    num_heads, length = scores.shape[1:]
    text = length - importance.shape[1]
    left = keep.clamp(max=length) - text
    if int(left.min()) < 1 or text == length:
        return keep[:, None].expand(-1, num_heads)
    weights = _share(importance.sum(-1)) + _share(_skewness(importance))
    return text + layers_by(weights, left, num_heads, length - text)


def _share(x: Tensor) -> Tensor:
    """Of all layers; none below 0."""
    x = x.clamp(min=0.0)
    return x / x.sum().clamp(min=1e-12)


def _skewness(x: Tensor) -> Tensor:
    """The adjusted sample skewness along the last dimension; 0 of fewer than 3, or of equal ones.

    n / ((n - 1) (n - 2)) Σ ((x - mean) / std)³, with the sample's standard deviation.
    """
    n = x.shape[-1]
    if n < 3:
        return torch.zeros_like(x[..., 0])
    deviation = x - x.mean(-1, keepdim=True)
    std = x.std(-1, keepdim=True)
    cubes = (deviation / std.clamp(min=1e-30)).pow(3)
    return cubes.sum(-1) * n / ((n - 1) * (n - 2))
