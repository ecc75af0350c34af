"""Load any image-and-text model of Transformers, and make a prompt about images ready for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_torchvision_available

from .chat import chat


def load_model(
    source: str, *, device: torch.device, dtype: str = "auto", revision: str = "main"
) -> tuple[Any, Any]:
    """A model in eval mode on the device, and its processor; never with code of its own.

    Args:
        source: a model on the hub, or a folder.
        dtype: of torch, by name; "auto" is the checkpoint's own on a GPU and float32 on a CPU,
            where half precision is slow.
        revision: of the model on the hub.

    Raises:
        ValueError: where Transformers cannot load it, saying why.
    """
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    options = {"revision": revision, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(_missing_torchvision(error) or str(error)) from error
    return model.eval().to(device), processor


def encode(model: Any, processor: Any, images: Sequence[Image.Image], prompt: str) -> Any:
    """A user's turn, images first, as the inputs of `generate`, on the model's device.

    Where the processor has no chat template, the prompt is taken as it is; it may then say itself
    where the images go, with the processor's image token.

    Raises:
        ValueError: for image tokens in the prompt, where they are not for it to place.
    """
    has_template = bool(getattr(processor, "chat_template", None))
    image_token = getattr(processor, "image_token", None) or ""
    marks = prompt.count(image_token) if image_token else 0
    if marks not in ((0,) if has_template else (0, len(images))):
        raise ValueError(f"prompt: got {marks} {image_token} in it, expected none: images go first")
    if has_template:
        inputs = processor.apply_chat_template(
            chat(images, [prompt]),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        text = prompt if marks else image_token * len(images) + prompt
        inputs = processor(images=list(images), text=text, return_tensors="pt")
    return inputs.to(model.device, dtype=model.dtype)


def _missing_torchvision(error: Exception) -> str | None:
    """What to install, where that is why: Transformers says it over many lines, naming no pip."""
    if not isinstance(error, ImportError) or is_torchvision_available():
        return None
    if "torchvision" not in str(error).lower():
        return None
    return "its processor needs torchvision: pip install torchvision"
