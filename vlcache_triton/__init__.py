"""VL-Cache for vision-language models: KV-cache compression as Triton kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .integrations.transformers import vl_cache
    from .recipe.budgets import layer_budgets
    from .recipe.config import VLCacheConfig

__version__ = "0.1.0"
__all__ = ["VLCacheConfig", "layer_budgets", "vl_cache"]

_HOMES = {
    "VLCacheConfig": ".recipe.config",
    "layer_budgets": ".recipe.budgets",
    "vl_cache": ".integrations.transformers",
}


def __getattr__(name: str) -> Any:
    """What the package offers, imported when it is asked for: it takes torch, and seconds."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
