"""VL-Cache, of this package's name (https://arxiv.org/abs/2410.23317)."""

from __future__ import annotations

from .policy import Policy


def vl_cache_policy() -> Policy:
    """VL-Cache (Tu et al., ICLR 2025): post-vision rows, layers by sparsity; all as configured."""
    return Policy("vl_cache")


VL_CACHE = vl_cache_policy()
