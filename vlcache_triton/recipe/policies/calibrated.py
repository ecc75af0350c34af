"""Shares of heads that a file says of a model (`vlcache calibrate`, or SparseMM's hits)."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from torch import Tensor

from ..profile import HeadHits, HeadProfile, check_fits, read_profile
from .policy import Policy, PromptStatistics
from .vl_cache import VL_CACHE


def calibrated(profile: HeadProfile | HeadHits | Path | str, policy: Policy = VL_CACHE) -> Policy:
    """A policy whose budget goes to heads of all layers as a profile of the model says.

    Args:
        profile: or its file.
        policy: what tokens are ranked by.

    Raises:
        ValueError, OSError: for a file that is no profile, or cannot be read.
    """
    if isinstance(profile, (Path, str)):
        profile = read_profile(profile)
    return dataclasses.replace(
        policy,
        name=f"{policy.name}, calibrated",
        share_heads=partial(by_profile, profile),
        made_for=profile.model if isinstance(profile, HeadProfile) else None,
    )


def by_profile(
    profile: HeadProfile | HeadHits, scores: Tensor, statistics: PromptStatistics, keep: Tensor
) -> Tensor:
    """`Policy.share_heads`."""
    num_layers, num_kv_heads, length = scores.shape
    check_fits(profile, num_layers, num_kv_heads)
    return profile.heads(int(keep.sum()) * num_kv_heads, length, num_kv_heads)
