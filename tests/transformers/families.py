"""The families of the adapter's table: their tiny models, and inputs for any prompt layout."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import tiny_models
import torch
import transformers as hf
from tiny_models import IMAGE, Pixels
from torch import Tensor

#: Families whose processors mark vision tokens in `mm_token_type_ids` (M-RoPE needs it).
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")

SUPPORTED = (
    "llava",
    "llava_next",
    "llava_onevision",
    *MROPE,
    "smolvlm",
    "idefics3",
    "internvl",
    "mistral3",
    "gemma3",
    "llama4",
)

#: Prompts are lists of token ids in which `PICTURE` stands for one whole image.
PICTURE = "picture"
LONG = [1, 5, 6, PICTURE, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]
SHORT = [1, 5, 6, PICTURE, 20, 21, 22, 23]


@dataclass(frozen=True)
class Family:
    """A tiny model and how prompts for it are laid out."""

    name: str
    model: hf.PreTrainedModel
    image: list[int]
    pixels: Pixels

    def inputs(self, *prompts: list, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments of `generate` and `forward` for a left-padded batch of prompts."""
        rows = [self._token_ids(prompt) for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs = dict(input_ids=ids, attention_mask=mask)
        if self.name in MROPE:
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        if self.name == "gemma3":
            inputs["token_type_ids"] = (ids == IMAGE).long()
        num_images = sum(prompt.count(PICTURE) for prompt in prompts)
        if num_images:
            generator = torch.Generator().manual_seed(seed)
            inputs |= self.pixels(num_images, len(prompts), generator)
        return inputs

    def _token_ids(self, prompt: list) -> list[int]:
        parts = (self.image if token == PICTURE else [token] for token in prompt)
        return list(itertools.chain.from_iterable(parts))

    @property
    def text_config(self) -> hf.PreTrainedConfig:
        return self.model.config.get_text_config(decoder=True)


def build(name: str, **text) -> Family:
    """A family's tiny model with sharp attention: random weights alone attend to all alike."""
    torch.manual_seed(0)
    model, image, pixels = getattr(tiny_models, name)(**text)
    family = Family(name, sharpened(model), image, pixels)
    with torch.no_grad():  # at the first such call Transformers hooks the model up, once for all
        model(**family.inputs(SHORT), output_attentions=True)
    return family


def sharpened(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """The model with sharp attention, ready for greedy decoding without an end."""
    model = model.eval().float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "vis" in parameter_name:
                continue
            if parameter_name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.add_(0.8)  # after these norms the projections' scale is lost
            elif "q_proj" in parameter_name or "k_proj" in parameter_name:
                parameter.mul_(12.0)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model
