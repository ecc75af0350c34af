"""VL-Cache for vision-language models: KV-cache compression as Triton kernels."""

from .budgets import layer_budgets
from .config import VLCacheConfig

__version__ = "0.1.0"
__all__ = ["VLCacheConfig", "layer_budgets"]
