"""Hooks round forward passes: what comes is announced to the cache before any layer runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from vlcache_triton.recipe.prompt import Prompt, left_pads, read_prompt

from .attention import prefilling
from .cache import VLCache
from .names import CACHE, rename_cache
from .support import text_model_of, unobserved
from .visual import can_know, vision_input, visual_tokens

if TYPE_CHECKING:
    from .session import Session

# The model whose pass has been announced: the models within it, which it runs, announce nothing.
running: ContextVar[PreTrainedModel | None] = ContextVar("running", default=None)


def models_of(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model and those within it that run its language model, outermost first: any of them may
    be the one that is called."""
    text_model = text_model_of(model)
    return [
        x
        for x in model.modules()
        if isinstance(x, PreTrainedModel) and any(y is text_model for y in x.modules())
    ]


def hook_passes(model: PreTrainedModel, session: Session, undo: ExitStack) -> None:
    """Have every forward pass of the model announced, until `undo` closes."""
    undo.callback(prefilling.set, None)
    undo.callback(running.set, None)
    for part in models_of(model):
        before = part.register_forward_pre_hook(_begin(session), with_kwargs=True)
        undo.callback(before.remove)
        after = part.register_forward_hook(_end(session), with_kwargs=True, always_call=True)
        undo.callback(after.remove)


def named_arguments(function: Callable[..., Any], args: tuple, kwargs: dict) -> dict[str, Any]:
    """All arguments of a call by their names, the cache by the one that Transformers gives it."""
    if args:
        kwargs = {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}
    return rename_cache(kwargs)


def check_cache(cache: Any, session: Session) -> None:
    """Refuse a cache that would not be compressed, and one of another model."""
    if cache is not None and not isinstance(cache, VLCache):
        raise ValueError(
            f"{CACHE}: got {type(cache).__name__}, expected a VLCache"
            " (session.new_cache()) or None inside a vl_cache block"
        )
    if cache is not None and cache.made_for != session.made_for:
        raise ValueError(
            f"{CACHE}: got one of {cache.made_for}, expected one of {session.made_for}"
        )


def _begin(session: Session) -> Any:
    """A forward pre-hook: tell the cache about the prompt, or the step, that comes."""

    def begin(model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        kwargs = named_arguments(model.forward, args, kwargs)
        cache = kwargs.get(CACHE)
        # The lean loop announces its steps itself, and calls the model's forward without hooks.
        is_lean = model is not session.model and isinstance(cache, VLCache) and cache.is_in_step
        if running.get() is not None or is_lean:
            if isinstance(cache, VLCache) and cache.position_ids is None:
                cache.position_ids = _last(kwargs.get("position_ids"))
            return None
        prefilling.set(None)
        if model.training:
            raise ValueError("model: got one in training mode, expected model.eval()")
        if cache is None:
            if kwargs.get("use_cache") is False:
                return (), kwargs
            cache = session.new_cache()
            kwargs = {**kwargs, CACHE: cache, "use_cache": True}
        check_cache(cache, session)
        session.cache = cache
        session.resume(cache)
        if cache.ragged is not None:
            _begin_step(session, cache, kwargs)
        else:
            _begin_prompt(session, cache, kwargs)
            # A lossless prompt takes the stock path, bit for bit.
            prefilling.set(cache.prompt if cache.will_pack else None)
        cache.position_ids = _last(kwargs.get("position_ids"))
        running.set(model)
        return (), kwargs

    return begin


def _end(session: Session) -> Any:
    """A forward hook: count the step's tokens, and see that the prompt was compressed."""

    def end(model: PreTrainedModel, args: tuple, kwargs: dict, output: Any) -> None:
        if running.get() is not model:
            return
        running.set(None)
        prefilling.set(None)
        cache = kwargs.get(CACHE)
        if output is None or not isinstance(cache, VLCache):  # None: the pass has raised
            return
        cache.end_step()
        cache.rope_deltas = session.rope_state.noted()
        if cache.will_compress and not cache.is_compressed:
            raise unobserved(model)

    return end


def _begin_step(session: Session, cache: VLCache, kwargs: dict[str, Any]) -> None:
    """Announce rows that come behind a packed prompt."""
    tokens = _tokens(kwargs)
    _check_mask(session, cache, kwargs.get("attention_mask"), tokens.shape[1])
    if (name := vision_input(kwargs)) is not None:
        session.say_whole(f"got {name} behind the first prompt of its cache")
    cache.begin_step(tokens.shape[1])


def _check_mask(session: Session, cache: VLCache, mask: Any, num_rows: int) -> None:
    """Refuse a mask that hides anything but the prompt's pads: nothing reads it later.

    Reading its values waits for the device, so that is done once a `generate`, which goes on with
    ones alone, and at every pass else.
    """
    if mask is None:
        return
    shape = (cache.num_seqs, cache.num_seen + num_rows)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"attention_mask: got {got}, expected {list(shape)} or None on a compressed cache"
        )
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"attention_mask: got shape {list(mask.shape)}, expected {list(shape)}: the tokens"
            " seen before, and those of this pass"
        )
    if session.has_read_mask(cache):
        return
    pads = left_pads(mask)
    if pads != list(cache.pads):
        raise ValueError(
            f"attention_mask: got {pads} left pads, expected {list(cache.pads)}, the prompt's"
        )


def _begin_prompt(session: Session, cache: VLCache, kwargs: dict[str, Any]) -> None:
    """Announce a prompt, or what makes one of a prompt that was left whole: its first image."""
    num_past = cache.get_seq_length()
    name = vision_input(kwargs)
    is_lossless = cache.config.is_lossless
    if num_past > 0 and (is_lossless or name is None):
        return
    prompt = _read_prompt(session, cache, kwargs, num_past)
    if name is not None and not is_lossless and not prompt.is_compressible:
        session.say_whole(f"got {name}, but no token of an image in input_ids")
    if num_past > 0 and max(prompt.query_rows) > prompt.padded_length - num_past:
        session.say_whole(
            f"got {name} with {prompt.padded_length - num_past} rows, expected"
            f" {max(prompt.query_rows)}, which {cache.policy.name!r} measures"
        )
        return
    cache.begin(prompt, num_past)


def _read_prompt(session: Session, cache: VLCache, kwargs: dict[str, Any], num_past: int) -> Prompt:
    """The prompt that a pass ends, num_past tokens of which are in the cache."""
    input_ids = kwargs.get("input_ids")
    if input_ids is None:
        input_ids = session.ids_of(kwargs.get("inputs_embeds"))
    if input_ids is None:
        raise NotImplementedError(
            "inputs_embeds: got embeddings alone, expected input_ids, which show where images lie"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise NotImplementedError("attention_mask: expected [num_seqs, length] or None")
    config, name = session.model.config, vision_input(kwargs)
    if name is not None and not cache.config.is_lossless and not can_know(config, kwargs):
        raise NotImplementedError(
            f"{name}: got an image for a model of type {config.model_type!r}, expected one whose"
            " configuration names an image token, or mm_token_type_ids: where the image lies in"
            " the prompt cannot be known"
        )
    is_visual = visual_tokens(config, input_ids, kwargs)
    return read_prompt(pad(is_visual, (num_past, 0)), mask, cache.config, cache.policy)


def _tokens(kwargs: dict[str, Any]) -> Tensor:
    """What a pass reads, `[num_seqs, n, ...]`."""
    tokens = kwargs.get("input_ids")
    return kwargs["inputs_embeds"] if tokens is None else tokens


def _last(position_ids: Any) -> Tensor | None:
    """Positions of the last rows `[..., num_seqs, 1]`, of those given."""
    return position_ids[..., -1:] if isinstance(position_ids, Tensor) else None
