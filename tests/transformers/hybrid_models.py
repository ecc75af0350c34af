"""Tiny models whose full-attention layers are few: the others are linear, convolutions or Mamba.

As `further_models`, of four layers, two of which have a cache that grows.
"""

from __future__ import annotations

from functools import partial

import torch
import transformers as hf
from further_models import _config, _grid, _model
from tiny_models import END, IMAGE, START, Built, _mrope, _patches
from torch import Tensor
from video_models import _video

LINEAR = dict(
    num_hidden_layers=4,
    layer_types=["linear_attention", "full_attention"] * 2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    rope_parameters=_mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.5),
)
CONV = dict(num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2)
MINICPM = dict(insert_layer_id=0)
EDGES = dict(
    image_start_id=START, image_end_id=END, slice_start_id=104, slice_end_id=105, newline_id=106
)


def qwen3_5() -> Built:
    model = _model("Qwen3_5", LINEAR, dict(patch_size=16))
    return model, [START, *[IMAGE] * 24, END], _patches(16)


qwen3_5_video = partial(_video, qwen3_5)


def qwen3_5_moe() -> Built:
    text = dict(LINEAR, shared_expert_intermediate_size=32)
    model = _model("Qwen3_5Moe", text, dict(patch_size=16))
    return model, [START, *[IMAGE] * 24, END], _patches(16)


def minicpmv4_6() -> Built:
    model = _model("MiniCPMV4_6", dict(LINEAR, model_type="qwen3_5_text"), {}, **MINICPM)
    return model, [START, *[IMAGE] * 6, END], _packed


def minicpmv4_7() -> Built:
    text = dict(LINEAR, model_type="qwen3_5_text")
    model = _model("MiniCPMV4_7", text, {}, **MINICPM, **EDGES)
    return model, [START, *[IMAGE] * 6, END], _packed


def minicpm_ocr() -> Built:
    """Four times the tokens: it leaves a merger out."""
    model = _model("MiniCPMOcr", dict(LINEAR, model_type="qwen3_5_text"), {}, **MINICPM)
    return model, [START, *[IMAGE] * 24, END], _packed


def lfm2_vl() -> Built:
    vision = dict(model_type="siglip2_vision_model", num_patches=64)

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Images of 8 x 12 patches, behind which the batch is padded."""
        mask = torch.ones(num_images, 100, dtype=torch.long)
        mask[:, 96:] = 0
        return dict(
            pixel_values=torch.randn(num_images, 100, 588, generator=generator),
            spatial_shapes=torch.tensor([[8, 12]] * num_images),
            pixel_attention_mask=mask,
        )

    model = _model("Lfm2Vl", CONV, vision, projector_hidden_size=64)
    return model, [START, *[IMAGE] * 24, END], pixels


def lfm3_vl() -> Built:
    """It has sliding layers too."""
    text = dict(sliding_window=16, num_hidden_layers=4)
    text |= dict(layer_types=["conv", "full_attention", "sliding_attention", "full_attention"])
    vision = dict(num_key_value_heads=2, layer_types=["conv", "full_attention"])
    model = _model("Lfm3Vl", text, vision, projector_hidden_size=64)
    return model, [START, *[IMAGE] * 24, END], _patches(14)


def nemotron_h_omni() -> Built:
    """Its blocks are layers of their own: Mamba, attention, experts or an MLP."""
    mixers = ["linear_attention", "full_attention", "moe", "linear_attention", "full_attention"]
    text = dict(layers_block_type=[*mixers, "mlp"], ssm_state_size=16, n_groups=2, chunk_size=16)
    text |= dict(mamba_num_heads=4, mamba_head_dim=16, moe_shared_expert_intermediate_size=32)
    vision = dict(video_temporal_patch_size=2, max_img_size=112, num_registers=1)
    more = dict(projector_hidden_size=64, vision_hidden_size=32, audio_config=None)
    grid = _grid(588)

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        images = grid(num_images, num_prompts, generator)
        return dict(
            pixel_values=images["pixel_values"], image_grid_hw=images["image_grid_thw"][:, 1:]
        )

    config = _config("NemotronH_Omni_Reasoning_V3_", text, vision, **more)
    return hf.NemotronH_Omni_Reasoning_V3(config), [START, *[IMAGE] * 24, END], pixels


def _packed(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Patches of all images in one row: 8 x 12 of each."""
    return dict(
        pixel_values=torch.randn(1, 3, 14, num_images * 96 * 14, generator=generator),
        target_sizes=torch.tensor([[8, 12]] * num_images),
    )
