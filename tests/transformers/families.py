"""The families of the adapter's table: their tiny models, and inputs for any prompt layout."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass

import further_models
import hybrid_models
import tiny_models
import torch
import transformers as hf
import video_models
from tiny_models import IMAGE, VIDEO, Pixels
from torch import Tensor

#: Families whose processors mark vision tokens in `mm_token_type_ids` (M-RoPE needs it).
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")

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

#: Held to equality alone, on the reference, where the installed Transformers has them.
FURTHER = [
    "apertus1p5",
    "aria",
    "aya_vision",
    "cohere2_vision",
    "cohere_compass",
    "cosmos3_edge",
    "cosmos3_omni",
    "deepseek_ocr2",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "ernie4_5_vl_moe",
    "exaone4_5",
    "fast_vlm",
    "fuyu",
    "gemma4",
    "gemma4_unified",
    "gemma4_vision_blocks",
    "glm46v",
    "glm4v_moe",
    "glm_ocr",
    "got_ocr2",
    "granite4_vision",
    "granite_docling",
    "hunyuan_vl",
    "hyperclovax_vision_v2",
    "idefics2",
    "internvl_gpt_oss",
    "janus",
    "lighton_ocr",
    "molmo2",
    "muse_glimmer",
    "muse_spark",
    "ovis2",
    "paddleocr_vl",
    "perception_lm",
    "qianfan_ocr",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
    "qwen3_vl_moe",
    "step3p7",
    "video_llama_3",
    "video_llava",
    "vipllava",
]
#: The same, with layers that keep a state instead of a cache that grows.
HYBRID = [
    "lfm2_vl",
    "lfm3_vl",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "nemotron_h_omni",
    "qwen3_5_moe",
]
VIDEOS = [
    "cohere_compass_video",
    "cosmos3_edge_video",
    "cosmos3_omni_video",
    "ernie4_5_vl_moe_video",
    "exaone4_5_video",
    "glm46v_video",
    "glm4v_moe_video",
    "glm4v_video",
    "glm_ocr_video",
    "hyperclovax_vision_v2_video",
    "llava_next_video",
    "llava_next_video_video",
    "llava_onevision_video",
    "molmo2_video",
    "perception_lm_video",
    "qwen2_5_omni_thinker_video",
    "qwen2_5_vl_video",
    "qwen2_vl_video",
    "qwen3_5_video",
    "qwen3_omni_moe_thinker_video",
    "qwen3_vl_moe_video",
    "qwen3_vl_video",
    "video_llama_3_video",
    "video_llava_video",
]

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
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            kind = 2 if self.name.endswith("_video") else 1
            is_visual = (ids == IMAGE) | (ids == VIDEO)
            inputs["mm_token_type_ids"] = kind * is_visual.int()
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
    modules = tiny_models, further_models, video_models, hybrid_models
    builder = next(getattr(x, name) for x in modules if hasattr(x, name))
    model, image, pixels = builder(**text)
    family = Family(name, sharpened(model), image, pixels)
    with torch.no_grad():  # at the first such calls Transformers marks the model, once for all
        model(**family.inputs(SHORT), output_attentions=True)
        model.set_attn_implementation({})
    return family


def sharpened(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """The model with sharp attention and long memory, ready for greedy decoding without an end."""
    model = model.eval().float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "vis" in parameter_name:
                continue
            if parameter_name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.add_(0.8)  # after these norms the projections' scale is lost
            elif any(part in parameter_name for part in ("q_proj", "k_proj", "query_key_value")):
                parameter.mul_(12.0)
            elif parameter_name.endswith("A_log"):
                parameter.fill_(-3.0)  # states that do not forget at once
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model
