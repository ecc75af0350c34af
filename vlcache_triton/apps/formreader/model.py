"""Load the form reader from the package's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor

WEIGHTS = Path(__file__).parent / "weights"


def load_form_reader(
    folder: Path | str = WEIGHTS,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The embedded vision-language model, in eval mode, and its processor; reads no network.

    folder: another one that benchmarks/accuracy/train_form_reader.py has written.

    10.9 M parameters, stored as fp16; float32 is the fast dtype on a CPU. The processor's chat
    template takes any number of images and turns. See weights/PROVENANCE.md for what it can do.
    """
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, local_files_only=True
    )
    processor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
    return model.eval().to(device), processor


def encode_chats(processor: LlavaProcessor, chats: Sequence[list[dict[str, Any]]]) -> BatchFeature:
    """Chats (see `chat`) as one batch for `model.generate`, padded on the left, on the CPU."""
    texts = [processor.apply_chat_template(c, add_generation_prompt=True) for c in chats]
    parts = [part for c in chats for message in c for part in message["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    return processor(images=images, text=texts, padding=True, return_tensors="pt")
