"""`with vl_cache(model, ...)`: a model compresses its cache inside, and is as it was outside."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from vlcache_triton import VLCacheConfig
from vlcache_triton.ops import BackendName, get_backend
from vlcache_triton.recipe.policies import VL_CACHE, Policy

from .attention import NAME, register
from .cache import MAX_HEAD_ROOM
from .forward import graphed_forward
from .names import CACHE, named_arguments, rename_cache
from .passes import check_cache, pass_announcer, pass_closer
from .session import Session
from .support import (
    check_choices,
    check_fp8,
    check_generate,
    check_kind,
    check_made_for,
    check_mode,
    check_model,
    models_of,
    warn_of_version,
)


@contextmanager
def vl_cache(
    model: PreTrainedModel,
    config: VLCacheConfig | None = None,
    *,
    policy: Policy = VL_CACHE,
    backend: BackendName = "auto",
    cuda_graph: bool | None = None,
    streaming: bool = False,
    **choices: Any,
) -> Iterator[Session]:
    """Compress the KV cache of every image-and-text prompt that `model` reads inside the block.

    Both `model.generate(...)` and manual loops over `model(...)` are served; the model leaves the
    block exactly as it came in, also after an exception.

    Args:
        model: a vision-language model of Transformers with causal text.
        config: the choices of compression, or give them as keywords: `budget=0.1`.
        policy: what ranks tokens and shares the budget out (vlcache_triton.recipe.policies), to
            compare VL-Cache with its rivals.
        backend: "auto" is the Triton kernels on CUDA and the fp32 reference elsewhere.
        cuda_graph: decode by replaying a captured step; default on CUDA. Where a capture fails,
            decoding goes on eagerly, with a warning that says why.
        streaming: compress during prefill, where memory is short; the same result. For low
            budgets: every layer holds all that it might yet keep. Of the dense cache's size, the
            peak was 0.22 at a budget of 0.1, 0.54 at 0.25, but 1.06 at 0.5 and 1.56 at 0.75 (16
            layers of 2,048 tokens); without streaming it is 1 + budget.

    Raises:
        NotImplementedError: for models on which VL-Cache is not defined.
        ValueError: for choices out of range or of another type, for a wrapped or compiled model,
            for one in training mode, and for one that is inside a block already.
        RuntimeError: at the end of an answer or of the block, where new tokens found no room in the
            cache (RaggedCache.check_room).
    """
    if config is not None and choices:
        raise ValueError(f"config: got a VLCacheConfig and {sorted(choices)}, expected one of them")
    config = VLCacheConfig(**choices) if config is None else config
    check_choices(config, policy, streaming)
    check_kind(model)
    warn_of_version()
    check_model(model)
    check_made_for(policy, model.config)
    check_fp8(policy.configure(config), get_backend(backend, model.device), model.device)
    if backend == "triton" and model.device.type != "cuda" and model.dtype == torch.bfloat16:
        raise NotImplementedError(
            "model: got bfloat16 in Triton's interpreter, which multiplies its bit patterns"
            " (triton#11584), expected float16 or float32"
        )
    text_config = model.config.get_text_config(decoder=True)
    if text_config._attn_implementation == NAME:
        raise ValueError("model: got one inside a vl_cache block already, expected another")
    cuda_graph = model.device.type == "cuda" if cuda_graph is None else cuda_graph
    session = Session(model, config, policy, backend, cuda_graph, streaming)
    register()
    with ExitStack() as undo:
        undo.callback(session.close)
        _override(model, "generate_batch", _refuse_generate_batch, undo)
        for part in models_of(model):  # BLIP-2's generate is one of its language model
            _override(part, "__deepcopy__", _refuse_deepcopy, undo)
            announce, close = pass_announcer(session), pass_closer(session)
            undo.callback(part.register_forward_pre_hook(announce, with_kwargs=True).remove)
            hook = part.register_forward_hook(close, with_kwargs=True, always_call=True)
            undo.callback(hook.remove)
            if not part.can_generate():
                continue
            _override(part, "generate", _checked_generate(part, session), undo)
            prepare = _prepare_cache(part._prepare_cache_for_generation, session)
            _override(part, "_prepare_cache_for_generation", prepare, undo)
        if cuda_graph:
            _override(model, "forward", graphed_forward(session.graphs, model.forward), undo)
        # On the internal attribute: the public setter would pass it on to the vision tower.
        previous = text_config._attn_implementation_internal
        undo.callback(setattr, text_config, "_attn_implementation_internal", previous)
        text_config._attn_implementation_internal = NAME
        yield session
        session.check_room()


def _override(model: PreTrainedModel, name: str, function: Any, undo: ExitStack) -> None:
    """Set an instance attribute until `undo` closes."""
    if name in model.__dict__:
        undo.callback(setattr, model, name, model.__dict__[name])
    else:
        undo.callback(delattr, model, name)
    setattr(model, name, function)


def _checked_generate(model: PreTrainedModel, session: Session) -> Any:
    generate: Any = model.generate

    @functools.wraps(generate)
    def checked(*args: Any, **kwargs: Any) -> Any:
        kwargs = rename_cache(kwargs)
        given = named_arguments(generate, args, kwargs)
        if given.get("inputs") is not None:
            given["input_ids"] = given.pop("inputs")
        check_cache(given.get(CACHE), session)
        check_generate(model, given)
        with session.generating(given.get("input_ids"), given.get(CACHE)):
            return generate(*args, **kwargs)

    return checked


def _refuse_generate_batch(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("generate_batch: continuous batching is not supported by vl_cache")


def _refuse_deepcopy(memo: dict) -> None:
    raise NotImplementedError(
        "copy.deepcopy: got a model inside its vl_cache block, expected one outside: the copy would"
        " run this one"
    )


def _prepare_cache(original: Any, session: Session) -> Any:
    """Give `generate` a VLCache, where the user did not."""

    @functools.wraps(original)
    def prepare(generation_config, model_kwargs, generation_mode, *args, **kwargs):
        check_mode(generation_mode)
        if model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = session.new_cache(
                generation_config.max_new_tokens or MAX_HEAD_ROOM
            )
        session.decodes_on(model_kwargs[CACHE])
        return original(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    return prepare
