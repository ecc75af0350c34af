"""SparseMM (https://arxiv.org/abs/2506.05344, https://github.com/CR400AF-A/SparseMM)."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from ..profile import HeadHits, read_profile
from .calibrated import by_profile
from .policy import Policy
from .snapkv import snapkv


def sparsemm(
    hits: HeadHits | Path | str, ratio: float = 0.1, window: int = 32, pool: int = 5
) -> Policy:
    """SparseMM (Wang et al., ICCV 2025): SnapKV's scores, and more of the budget for heads that
    look at the words that are read off an image.

    The window is kept of every head, and `ratio` of an even share of what is left; the rest goes by
    the hits of the query heads of a KV head, over all layers.

    Args:
        hits: of the model, or the file that their code writes.
        ratio: in [0, 1].

    Raises:
        ValueError: for a ratio out of range, or a file that holds no hits.
        OSError: for a file that cannot be read.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: got {ratio}, expected a number in [0, 1]")
    found = hits if isinstance(hits, HeadHits) else read_profile(hits)
    if not isinstance(found, HeadHits):
        raise ValueError(f"hits: got a profile of {found.model}, expected SparseMM's hits")
    found = dataclasses.replace(found, ratio=ratio, window=window)
    scores = snapkv(window, pool)
    return dataclasses.replace(scores, name="sparsemm", share_heads=partial(by_profile, found))
