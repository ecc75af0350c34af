"""What is compared: policies by budget, and the paper's choices one at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from vlcache_triton.recipe.config import VLCacheConfig

from ..evaluation.variants import PAPER_CLIPPING, Variant, readings, rivals

#: Fields of VLCacheConfig and their values, each set alone; the paper's among them.
ABLATED: dict[str, tuple[Any, ...]] = {
    "threshold": (0.001, 0.003, 0.01, 0.03, 0.1),
    "recent_fraction": (0.0, 0.05, 0.1, 0.2, 0.4),
    "granularity": ("kv_head", "layer"),
    "clipping": ("exact", "paper"),
    "remainder": ("none", "mean"),
}


def curves(budget: float, attention: Tensor | None = None) -> list[Variant]:
    """VL-Cache in both granularities, every published policy, and the tuned presets."""
    by_layer = [v for v in readings(budget) if v.name != PAPER_CLIPPING]
    return rivals(budget) + by_layer


def ablated(budget: float, attention: Tensor | None = None) -> list[Variant]:
    """The paper's recipe with one of its choices changed; "field=value" is a variant's name."""
    config = VLCacheConfig(budget=budget)
    return [
        Variant(f"{field}={value}", replace(config, **{field: value}))
        for field, values in ABLATED.items()
        for value in values
    ]
