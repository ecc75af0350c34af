"""What SGLang calls: at its start, to learn of the backend; once a model is loaded, to make it."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from vlcache_triton.recipe.config import VLCacheConfig

from .hooks import BACKEND_NAME, Hooks
from .settings import read_settings
from .support import SGLANG_VERSION, check_server, check_version

if TYPE_CHECKING:
    from .backend import VLCacheAttnBackend

logger = logging.getLogger(__name__)


def register() -> None:
    """Make "vlcache" a choice of --attention-backend; hook in where the version is ours."""
    from sglang.srt.arg_groups.choices import (
        ATTENTION_BACKEND_CHOICES,
        add_attention_backend_choices,
    )
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if BACKEND_NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([BACKEND_NAME])
    hooks = Hooks()
    register_attention_backend(BACKEND_NAME)(partial(create_backend, hooks))
    if version("sglang") == SGLANG_VERSION:  # the backend refuses to start on any other
        hooks.register()


def create_backend(hooks: Hooks, runner: Any) -> VLCacheAttnBackend:
    """What SGLang calls for `--attention-backend vlcache`, once the model is loaded.

    Raises:
        ValueError, NotImplementedError, RuntimeError: with a sentence, where it cannot serve.
    """
    from .backend import VLCacheAttnBackend  # SGLang's own backends come with it

    check_version()
    settings = read_settings(os.environ)
    hooks.check()
    check_server(runner)
    if not runner.model_config.is_generation:
        logger.info("vlcache: an embedding model does not decode, so nothing is compressed.")
        settings = replace(settings, config=VLCacheConfig(budget=1.0))
    backend = VLCacheAttnBackend(runner, settings)
    logger.info(settings.describe())
    if not settings.config.is_lossless:
        logger.info(backend.describe_fit(runner))
    hooks.table = backend.table
    return backend
