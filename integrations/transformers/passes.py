"""What is done before and behind forward passes: the cache is told what comes before any layer
runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from vlcache_triton.pool.packed import PackedCache
from vlcache_triton.recipe.prompt import Prompt, left_pads, read_prompt

from .cache import VLCache
from .names import CACHE, named_arguments
from .session import Session
from .support import unobserved
from .visual import can_know, vision_input, visual_tokens


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


def pass_announcer(session: Session) -> Any:
    """A forward pre-hook: tell the cache about the prompt, or the step, that comes."""

    def begin(model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        kwargs = named_arguments(model.forward, args, kwargs)
        cache = kwargs.get(CACHE)
        # The lean loop announces its steps itself, and calls the model's forward without hooks.
        packed = cache.packed if isinstance(cache, VLCache) else None
        is_lean = model is not session.model and packed is not None and packed.step_rows > 0
        if session.running.model is not None or is_lean:
            if isinstance(cache, VLCache) and cache.position_ids is None:
                cache.position_ids = _last(kwargs.get("position_ids"))
            return None
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
        if cache.packed is not None:
            _begin_step(session, cache, cache.packed, kwargs)
        else:
            _begin_prompt(session, cache, kwargs)
        cache.position_ids = _last(kwargs.get("position_ids"))
        session.running.model = model
        return (), kwargs

    return begin


def pass_closer(session: Session) -> Any:
    """A forward hook: count the step's tokens, and see that the prompt was compressed."""

    def end(model: PreTrainedModel, args: tuple, kwargs: dict, output: Any) -> None:
        if session.running.model is not model:
            return
        session.running.model = None
        cache = kwargs.get(CACHE)
        if not isinstance(cache, VLCache):
            return
        is_unobserved = cache.contents.stop_reading()
        if output is None:  # the pass has raised
            return
        cache.end_pass()
        cache.rope_deltas = session.rope_state.noted()
        if is_unobserved:
            raise unobserved(model)

    return end


def _begin_step(
    session: Session, cache: VLCache, packed: PackedCache, kwargs: dict[str, Any]
) -> None:
    """Announce rows that come behind a packed prompt."""
    num_rows, mask = _tokens(kwargs).shape[1], kwargs.get("attention_mask")
    if mask is not None:
        _check_mask(packed, mask, num_rows, reads_values=not session.has_read_mask(cache))
    if (name := vision_input(kwargs)) is not None:
        session.say_whole(f"got {name} behind the first prompt of its cache")
    packed.begin_step(num_rows)


def _check_mask(packed: PackedCache, mask: Any, num_rows: int, reads_values: bool) -> None:
    """Refuse a mask that hides anything but the prompt's pads: nothing reads it later.

    Reading its values waits for the device, so that is done once a `generate`, which goes on with
    ones alone, and at every pass else.
    """
    shape = (len(packed.pads), packed.num_seen + num_rows)
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
    if reads_values and (pads := left_pads(mask)) != list(packed.pads):
        raise ValueError(
            f"attention_mask: got {pads} left pads, expected {list(packed.pads)}, the prompt's"
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
