"""LLaVA-1.6-Mistral-7B's language model with random weights, its prompts, and its roofline."""

from __future__ import annotations

import functools

import torch
from measure import DEVICE, DTYPE, HAS_GPU
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, PreTrainedModel

QUESTION = 50 if HAS_GPU else 5  # tokens behind the image
SEVEN_B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32064,
    "max_position_embeddings": 1 << 18,
    "rope_theta": 1e6,
    "sliding_window": None,
}
MINIATURE = {
    **SEVEN_B,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
}


@functools.cache
def build(name: str | None) -> PreTrainedModel:
    """The model on the device, in bf16 (fp32 on the CPU). Random weights are made there.

    Prompts bring no pixels, so that the vision tower, which compression leaves alone, is tiny.
    """
    dtype = DTYPE if HAS_GPU else torch.float32
    if name is not None:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(DEVICE).eval()
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = SEVEN_B if HAS_GPU else MINIATURE
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=text["vocab_size"] - 1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlavaNextForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(model: PreTrainedModel, num_seqs: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens with one image token before the question: embeddings of all kinds stand for
    the image's, and the boundary lies where it would."""
    image = model.config.image_token_id
    generator = torch.Generator(DEVICE).manual_seed(seed)
    tokens = torch.randint(3, image, (num_seqs, length), generator=generator, device=DEVICE)
    tokens[:, length - QUESTION - 1] = image
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def weight_bytes(model: PreTrainedModel) -> int:
    """What a decode step reads of the weights: all of the language model but its embedding."""
    text = model.get_decoder()
    embedding = text.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    return sum(p.nbytes for p in text.parameters()) - embedding.nbytes + head.nbytes


def kv_bytes_of_a_token(model: PreTrainedModel) -> int:
    """K and V of one token in all layers."""
    text = model.config.get_text_config(decoder=True)
    row = text.num_key_value_heads * text.head_dim * model.dtype.itemsize
    return 2 * text.num_hidden_layers * row
