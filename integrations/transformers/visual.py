"""Where a prompt's visual tokens are: by their ids, or by what its processor has marked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

ID_NAMES = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
ID_WORDS = ("<image>", "<video>")  # in the vocabulary maps of Chameleon and Emu3
# Marks of processors, `[num_seqs, length]`, above 0 on visual tokens. `token_type_ids` is never
# used: models give it other meanings.
MARKS = ("mm_token_type_ids", "image_embeds_position_mask")
# How models call what a vision encoder reads, or has made.
VISION_INPUTS = ("pixel", "image_embeds", "image_patches", "flattened_patches", "image_encoder")


def visual_ids(config: PreTrainedConfig) -> list[int]:
    """The token ids that stand for images and videos, as far as the configuration tells."""
    sources = (config, getattr(config, "vision_config", None))
    words = getattr(config, "vocabulary_map", None) or {}
    found = {getattr(source, name, None) for source in sources for name in ID_NAMES}
    found |= {words.get(word) for word in ID_WORDS}
    return sorted(x for x in found if isinstance(x, int))


def visual_tokens(
    config: PreTrainedConfig, input_ids: Tensor, kwargs: dict[str, Any] | None = None
) -> Tensor:
    """`[num_seqs, length]` bool: image and video tokens.

    Args:
        config: of the model, which names their ids.
        input_ids: `[num_seqs, length]`.
        kwargs: the other arguments of the forward pass, with the processor's marks.
    """
    ids = torch.tensor(visual_ids(config), dtype=torch.long, device=input_ids.device)
    is_visual = torch.isin(input_ids, ids)
    for marks in _marks(kwargs or {}):
        if marks.shape == input_ids.shape:
            is_visual = is_visual | (marks.to(input_ids.device) > 0)
    return is_visual


def can_know(config: PreTrainedConfig, kwargs: dict[str, Any]) -> bool:
    """Whether visual tokens could be told from text, were there any."""
    return bool(visual_ids(config) or _marks(kwargs))


def vision_input(kwargs: dict[str, Any]) -> str | None:
    """The name of an argument that brings an image or a video into a forward pass, if one does."""
    return next(
        (
            name
            for name, x in kwargs.items()
            if x is not None
            and name not in MARKS
            and (any(word in name for word in VISION_INPUTS) or _has_vision(name, x))
        ),
        None,
    )


def _has_vision(name: str, x: Any) -> bool:
    """Whether this is what `generate` has encoded before the prompt, with images in it."""
    if name != "mm_encoder_outputs" or not isinstance(x, dict):
        return False
    return any(made is not None for kind, made in x.items() if kind != "audio")


def _marks(kwargs: dict[str, Any]) -> list[Tensor]:
    return [kwargs[name] for name in MARKS if isinstance(kwargs.get(name), Tensor)]
