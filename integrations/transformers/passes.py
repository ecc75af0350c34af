"""What is done before and behind forward passes: the cache is told what comes before any layer
runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from vlcache_triton.pool.packed import PackedCache
from vlcache_triton.recipe.prompt import read_prompt

from .cache import VLCache
from .names import CACHE, named_arguments
from .session import Session
from .support import unobserved
from .turns import can_measure, num_rows_of, read_pads, read_turn, visual_rows
from .visual import vision_input


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
    num_rows, mask, is_pad = num_rows_of(kwargs), kwargs.get("attention_mask"), None
    if mask is not None:
        is_pad = read_pads(packed, mask, num_rows, reads_values=not session.has_read_mask(cache))
    cache.begin_step(num_rows, is_pad, read_turn(session, cache, packed, kwargs, is_pad))


def _begin_prompt(session: Session, cache: VLCache, kwargs: dict[str, Any]) -> None:
    """Announce a prompt, or what makes one of a prompt that was left whole: its first image."""
    num_past, is_lossless = cache.get_seq_length(), cache.config.is_lossless
    name = vision_input(kwargs)
    if num_past > 0 and (is_lossless or name is None):
        return
    is_visual, mask = visual_rows(session, cache, kwargs), kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise NotImplementedError("attention_mask: expected [num_seqs, length] or None")
    prompt = read_prompt(pad(is_visual, (num_past, 0)), mask, cache.config, cache.policy)
    if not is_lossless and name is not None:
        is_measured = can_measure(session, cache, kwargs, prompt)
        if num_past > 0 and not is_measured:
            return
    cache.begin(prompt, num_past)


def _last(position_ids: Any) -> Tensor | None:
    """Positions of the last rows `[..., num_seqs, 1]`, of those given."""
    return position_ids[..., -1:] if isinstance(position_ids, Tensor) else None
