"""Tiny models that differ from the table's in how they take images, positions or masks."""

from __future__ import annotations

import torch
import transformers as hf
from families import Family, sharpened
from tiny_models import CLIP, END, IMAGE, START, TEXT, VIDEO, VISION, _patches, _square


def hyperclovax() -> Family:
    """Its `prepare_inputs_for_generation` takes positions away: its text counts pads."""
    torch.manual_seed(0)
    config = hf.HyperCLOVAXVisionV2Config(
        vision_config=dict(
            model_type="qwen2_5_vl_vision",
            depth=2,
            num_heads=4,
            patch_size=14,
            hidden_size=32,
            intermediate_size=48,
            out_hidden_size=64,
            spatial_merge_size=2,
            window_size=56,
            fullatt_block_indexes=[1],
        ),
        text_config=dict(TEXT, model_type="hyperclovax"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    model = hf.HyperCLOVAXVisionV2ForConditionalGeneration(config)
    return Family("hyperclovax", sharpened(model), [START, *[IMAGE] * 24, END], _patches(14))


def llava_on_doge() -> Family:
    """Its text adds a bias of its own to the attention's mask."""
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=CLIP,
        text_config=dict(TEXT, model_type="doge", keep_window_size=2048),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    return Family(
        "doge", sharpened(hf.LlavaForConditionalGeneration(config)), [IMAGE] * 16, _square
    )


def llava_on_gemma2() -> Family:
    """Its text caps logits softly, in layers with a window too."""
    torch.manual_seed(0)
    text = dict(TEXT, model_type="gemma2", head_dim=16, attn_logit_softcapping=2.0)
    text |= dict(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16)
    text |= dict(query_pre_attn_scalar=4)
    config = hf.LlavaConfig(
        vision_config=CLIP,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    model = sharpened(hf.LlavaForConditionalGeneration(config))
    model.set_attn_implementation({"text_config": "eager"})  # to 5.17 SDPA, which drops the cap
    return Family("gemma2", model, [IMAGE] * 16, _square)


def blip2() -> Family:
    """Its `forward` and `generate` begin with `pixel_values`; `generate` is its text's."""
    torch.manual_seed(0)
    config = hf.Blip2Config(
        vision_config=dict(VISION, image_size=56, patch_size=14),
        qformer_config=dict(VISION, encoder_hidden_size=32, vocab_size=32),
        text_config=dict(
            TEXT,
            model_type="opt",
            num_key_value_heads=4,
            ffn_dim=96,
            word_embed_proj_dim=64,
            dropout=0.0,
        ),
        num_query_tokens=8,
        image_token_index=IMAGE,
    )
    return Family(
        "blip2", sharpened(hf.Blip2ForConditionalGeneration(config)), [IMAGE] * 8, _square
    )


def kosmos2() -> Family:
    """It has no image token: its processor marks positions."""
    torch.manual_seed(0)
    text = dict(
        vocab_size=160, embed_dim=64, layers=4, ffn_dim=96, attention_heads=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    config = hf.Kosmos2Config(
        text_config=text,
        vision_config=dict(VISION, image_size=56, patch_size=14),
        latent_query_num=8,
    )
    return Family(
        "kosmos2", sharpened(hf.Kosmos2ForConditionalGeneration(config)), [IMAGE] * 8, _square
    )


def git() -> hf.PreTrainedModel:
    """Its images come before all tokens, which say nothing of them."""
    config = hf.GitConfig(
        vision_config=dict(VISION, image_size=56, patch_size=14),
        **{k: v for k, v in TEXT.items() if k != "num_key_value_heads"},
    )
    return hf.GitForCausalLM(config).eval()
