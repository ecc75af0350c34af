"""Tiny random checkpoints with their processors, as a server loads them from disk."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

VOCAB_SIZE = 320
TEXT = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)


def byte_tokenizer(special: list[str], **names: str) -> PreTrainedTokenizerFast:
    """Bytes are tokens 0 to 255, the special tokens follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_qwen2_5_vl(path: Path, **text) -> None:
    """M-RoPE, images of `(height / 28) * (width / 28)` tokens. text: changes of the text model."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
    special += ["<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(
        special,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    rope = dict(rope_type="default", type="default", mrope_section=[2, 3, 3], rope_theta=10000.0)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            {**TEXT, **text},
            model_type="qwen2_5_vl_text",
            rope_theta=10000.0,
            rope_parameters=rope,
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
        ),
        vision_config=dict(
            model_type="qwen2_5_vl",
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            out_hidden_size=128,
            window_size=112,
            fullatt_block_indexes=[1],
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    _save(Qwen2_5_VLForConditionalGeneration(config), path)
    pixels = dict(
        min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 256, patch_size=14, temporal_patch_size=2
    )
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels, merge_size=2),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels, merge_size=2),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)


def save_llava(path: Path) -> None:
    """LLaVA with a Pixtral vision tower, the kind that SGLang loads in Hugging Face's format."""
    special = ["<s>", "</s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = byte_tokenizer(special, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = LlavaConfig(
        vision_config=dict(
            model_type="pixtral",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=8,
            hidden_act="silu",  # the only one that SGLang computes
            image_size=168,
            patch_size=14,
        ),
        text_config=dict(TEXT, model_type="llama", bos_token_id=256, eos_token_id=257),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    _save(LlavaForConditionalGeneration(config), path)
    PixtralProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": 168}, patch_size={"height": 14, "width": 14}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    ).save_pretrained(path)


def save_lfm2_vl(path: Path) -> None:
    """Convolutions, which keep a state, between the layers of attention."""
    special = ["<|pad|>", "<|startoftext|>", "<|im_end|>", "<image>", "<|image_start|>"]
    tokenizer = byte_tokenizer(
        [*special, "<|image_end|>"],
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens={
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
        },
    )
    text = dict(TEXT, num_hidden_layers=6)
    config = Lfm2VlConfig(
        vision_config=dict(
            model_type="siglip2_vision_model",
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            patch_size=14,
            num_patches=256,
            vision_use_head=False,
        ),
        text_config=dict(
            text,
            model_type="lfm2",
            layer_types=["conv", "full_attention"] * 3,
            conv_L_cache=3,
            block_auto_adjust_ff_dim=False,
            block_ff_dim=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        downsample_factor=2,
        projector_hidden_size=128,
        tie_word_embeddings=False,
    )
    _save(Lfm2VlForConditionalGeneration(config), path)
    # Named as on the hub: SGLang knows no other names, and passes over those it does not know.
    weights = load_file(path / "model.safetensors")
    tower = "model.vision_tower."
    named = {name.replace(tower, tower + "vision_model."): x for name, x in weights.items()}
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    pixels = dict(min_image_tokens=4, max_image_tokens=64, max_num_patches=256, tile_size=112)
    Lfm2VlProcessor(
        image_processor=Lfm2VlImageProcessor(
            **pixels, encoder_patch_size=14, downsample_factor=2, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)


def _save(model: PreTrainedModel, path: Path) -> None:
    """Weights that are far from zero: greedy tokens should differ from one prompt to the next."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.12)
    model.to(torch.float32).save_pretrained(path)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
