"""VL-Cache for vision-language models: KV-cache compression as Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budgets import layer_budgets
    from .config import VLCacheConfig

__version__ = "0.1.0"
__all__ = ["VLCacheConfig", "layer_budgets"]


def __getattr__(name: str) -> Any:
    """What the package offers, imported when it is asked for: it takes torch, and seconds."""
    if name == "VLCacheConfig":
        from .config import VLCacheConfig

        return VLCacheConfig
    if name == "layer_budgets":
        from .budgets import layer_budgets

        return layer_budgets
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
