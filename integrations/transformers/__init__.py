"""VL-Cache for Transformers: `with vl_cache(model, budget=0.1): model.generate(...)`."""

from .cache import VLCache
from .context import Session, vl_cache

__all__ = ["Session", "VLCache", "vl_cache"]
