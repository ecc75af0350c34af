"""lmms-eval (0.7.3) runs its tasks on compressed caches: `lmms-eval --model vlcache`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval asks of the entry points in its group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vlcache", simple_class_path=f"{__name__}.model.VLCacheModel")
