"""Tiny models of the families whose cache VL-Cache cannot compress."""

from __future__ import annotations

import transformers as hf
from tiny_models import END, IMAGE, SIGLIP, START, TEXT, VIDEO, VOCAB_SIZE

GEMMA_TEXT = dict(
    TEXT,
    head_dim=16,
    sliding_window=16,
    layer_types=["sliding_attention", "full_attention"] * 2,
    vocab_size_per_layer_input=VOCAB_SIZE,
    hidden_size_per_layer_input=8,
)


def paligemma() -> hf.PreTrainedModel:
    """Its prompt is a prefix whose tokens all see each other."""
    config = hf.PaliGemmaConfig(
        vision_config=dict(SIGLIP, projection_dim=64),
        text_config=dict(TEXT, model_type="gemma", num_key_value_heads=1, head_dim=16),
        image_token_index=IMAGE,
        projection_dim=64,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def mllama() -> hf.PreTrainedModel:
    """Its images enter through cross-attention."""
    config = hf.MllamaConfig(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_global_layers=1,
            attention_heads=4,
            image_size=56,
            patch_size=14,
            vision_output_dim=64,
            intermediate_layers_indices=[0],
        ),
        text_config=dict(
            TEXT,
            cross_attention_layers=[1],
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        image_token_index=IMAGE,
    )
    return hf.MllamaForConditionalGeneration(config)


def gemma3n() -> hf.PreTrainedModel:
    """Its upper layers read the KV of lower ones. (The decoder alone: its vision needs timm.)"""
    more = dict(num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * 4, laurel_rank=4)
    return hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**GEMMA_TEXT, **more))


def gemma4_shared() -> hf.PreTrainedModel:
    """Its upper layers read the KV of lower ones, as in the small checkpoints."""
    config = hf.Gemma4Config(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            position_embedding_size=64,
        ),
        text_config=dict(GEMMA_TEXT, num_kv_shared_layers=2),
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boi_token_id=START,
        eoi_token_id=END,
    )
    return hf.Gemma4ForConditionalGeneration(config)
