"""VL-Cache for Transformers: `with vl_cache(model, budget=0.1): model.generate(...)`."""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "vl_cache needs Transformers, which is not installed: "
        "pip install 'vlcache-triton[transformers]'",
        name="transformers",
    )

from .cache import VLCache
from .context import vl_cache
from .session import Session

__all__ = ["Session", "VLCache", "vl_cache"]
