"""What rows behind a prompt are: which are pads, which are of an image, what is to be measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlcache_triton.pool.packed import PackedCache, pads_first
from vlcache_triton.recipe.prompt import Prompt, read_prompt

from .cache import VLCache
from .session import Session
from .visual import can_know, vision_input, visual_tokens


def read_pads(packed: PackedCache, mask: Any, num_rows: int, reads_values: bool) -> Tensor | None:
    """Which rows of a pass are pads, `[num_seqs, num_rows]` bool on the host, by the mask of all
    tokens so far; None where none is.

    They may lie between rows: of an answer, whose last token nobody has read yet, and of the next
    question. A mask that hides what was read before is refused, as is one that hides last rows.

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
    if not reads_values:
        return None
    real = mask.cpu() != 0
    before, is_pad = real[:, : packed.num_seen], ~real[:, packed.num_seen :]
    if not torch.equal(before, packed.is_real()):
        raise ValueError(
            f"attention_mask: got {(~before).sum(1).tolist()} zeros on tokens seen before, expected"
            f" {packed.num_pads}, on the left pads that were among them"
        )
    if is_pad[:, -1].any():
        raise ValueError(
            "attention_mask: got a zero on the last row of sequences"
            f" {is_pad[:, -1].nonzero()[:, 0].tolist()}, expected padding before it"
            " (padding_side='left')"
        )
    return is_pad if is_pad.any() else None


def read_turn(
    session: Session,
    cache: VLCache,
    packed: PackedCache,
    kwargs: dict[str, Any],
    is_pad: Tensor | None,
) -> Prompt | None:
    """What a pass behind a packed prompt is to be measured for; None for nothing.

    With an image, its own rows, which are to be compressed; where nothing has been yet, all of the
    cache with them, as one prompt. With text alone, its rows where they exceed the bound.
    """
    num_rows = num_rows_of(kwargs)
    pads = [0] * len(packed.pads) if is_pad is None else is_pad.sum(1).tolist()
    if not cache.config.is_lossless and vision_input(kwargs) is not None:
        num_past = 0 if cache.is_compressed else packed.num_seen
        is_visual = visual_rows(session, cache, kwargs)
        if is_pad is not None and (order := pads_first(is_pad)) is not None:
            is_visual = is_visual.take_along_dim(order.to(is_visual.device), 1)
        is_visual = pad(is_visual, (num_past, 0))
        hidden = torch.tensor(pads)
        if num_past > 0:
            hidden += torch.tensor(packed.num_pads)
        is_real = (torch.arange(num_past + num_rows) >= hidden[:, None]).to(is_visual.device)
        prompt = read_prompt(is_visual, is_real, cache.config, cache.policy)
        if can_measure(session, cache, kwargs, prompt):
            return prompt
    if num_rows > 1 and cache.is_compressed and _exceeds_bound(cache, packed, num_rows, pads):
        return Prompt(num_rows, tuple(pads), (0,) * len(pads))
    return None


def _exceeds_bound(cache: VLCache, packed: PackedCache, num_rows: int, pads: list[int]) -> bool:
    bound = cache.config.max_cache_tokens
    if bound is None:
        return False
    live = packed.ragged.seqused_k.view(-1, len(pads), packed.ragged.num_kv_heads)
    rows = live.double().mean((0, 2)).cpu() + num_rows - torch.tensor(pads)
    return bool((rows > bound).any())


def can_measure(session: Session, cache: VLCache, kwargs: dict[str, Any], prompt: Prompt) -> bool:
    """Whether there is an image in what comes with one, and the rows of the pass are all that are
    measured; said where not."""
    name, num_rows = vision_input(kwargs), num_rows_of(kwargs)
    if not prompt.is_compressible:
        session.say_whole(f"got {name}, but no token of an image in input_ids")
        return False
    if max(prompt.query_rows) > num_rows:
        session.say_whole(
            f"got {name} with {num_rows} rows, expected {max(prompt.query_rows)}, which"
            f" {cache.policy.name!r} measures"
        )
        return False
    return True


def visual_rows(session: Session, cache: VLCache, kwargs: dict[str, Any]) -> Tensor:
    """`[num_seqs, n]` bool: which rows of a pass are visual tokens."""
    input_ids = kwargs.get("input_ids")
    if input_ids is None:
        input_ids = session.ids_of(kwargs.get("inputs_embeds"))
    if input_ids is None:
        raise NotImplementedError(
            "inputs_embeds: got embeddings alone, expected input_ids, which show where images lie"
        )
    config, name = session.model.config, vision_input(kwargs)
    if name is not None and not cache.config.is_lossless and not can_know(config, kwargs):
        raise NotImplementedError(
            f"{name}: got an image for a model of type {config.model_type!r}, expected one whose"
            " configuration names an image token, or mm_token_type_ids: where the image lies in"
            " the prompt cannot be known"
        )
    return visual_tokens(config, input_ids, kwargs)


def num_rows_of(kwargs: dict[str, Any]) -> int:
    """How many rows a sequence a pass reads."""
    tokens = kwargs.get("input_ids")
    return (kwargs["inputs_embeds"] if tokens is None else tokens).shape[1]
