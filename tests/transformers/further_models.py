"""Tiny models of the families that are held to equality alone, one short builder for each.

A builder returns what those of `tiny_models` do. Two layers each; what a configuration does not get
here it has from `TEXT` and `VISION`, as far as it knows the name.
"""

from __future__ import annotations

import inspect
import math

import pytest
import tiny_models
import torch
import transformers as hf
from tiny_models import (
    END,
    IMAGE,
    PINPOINTS,
    START,
    VIDEO,
    Built,
    Pixels,
    _mrope,
    _patches,
    _square,
)
from torch import Tensor

TEXT = dict(
    tiny_models.TEXT,
    num_hidden_layers=2,
    head_dim=16,
    layer_types=["full_attention"] * 2,
    sliding_window=None,
    moe_intermediate_size=32,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
)
VISION = dict(
    hidden_size=32,
    embed_dim=32,
    intermediate_size=48,
    mlp_dim=48,
    num_hidden_layers=2,
    depth=2,
    num_attention_heads=4,
    num_heads=4,
    image_size=56,
    patch_size=14,
    out_hidden_size=64,
    projection_dim=32,
    window_size=56,
    deepstack_visual_indexes=[0, 1],
    fullatt_block_indexes=[1],
    num_position_embeddings=64,
)
AUDIO = dict(
    d_model=32,
    encoder_layers=1,
    encoder_attention_heads=4,
    encoder_ffn_dim=48,
    output_dim=64,
    downsample_hidden_size=8,
    out_hidden_size=64,
    hidden_sizes=[8] * 4,
    depths=[1] * 4,
    codebook_size=16,
)
IDS = dict(
    image_token_id=IMAGE,
    image_token_index=IMAGE,
    video_token_id=VIDEO,
    video_token_index=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
    image_start_token_id=START,
    image_end_token_id=END,
    video_start_token_id=104,
    video_end_token_id=105,
    vision_feature_layer=-1,
    vision_feature_layers=-1,  # ViP-LLaVA's, in Transformers 5.17
    image_grid_pinpoints=PINPOINTS,
)


def _model(name: str, text: dict, vision: dict | hf.PreTrainedConfig, **more) -> hf.PreTrainedModel:
    """The family's model from its own classes, or the test is skipped where these do not exist."""
    config = _config(name, text, vision, **more)
    kind = "ForCausalLM" if name == "Fuyu" else "ForConditionalGeneration"
    return getattr(hf, name + kind)(config)


def _config(
    name: str, text: dict, vision: dict | hf.PreTrainedConfig, **more
) -> hf.PreTrainedConfig:
    if not hasattr(hf, f"{name}Config"):
        pytest.skip(f"Transformers {hf.__version__} has no {name}")
    config_class = getattr(hf, f"{name}Config")
    stock = config_class()
    parts: dict = {"text_config": _part(stock.text_config, TEXT, text)}
    if isinstance(vision, dict) and hasattr(stock, "vision_config"):
        parts["vision_config"] = _part(stock.vision_config, VISION, vision)
    elif not isinstance(vision, dict):
        parts["vision_config"] = vision
    if getattr(stock, "audio_config", None) is not None:
        parts["audio_config"] = _part(stock.audio_config, AUDIO, {})
    return config_class(**{**_known(stock, IDS), **parts, **more})


def _part(stock: hf.PreTrainedConfig, sizes: dict, given: dict) -> hf.PreTrainedConfig:
    if "model_type" in given:
        stock = hf.AutoConfig.for_model(given["model_type"])
    given = {key: value for key, value in given.items() if key != "model_type"}
    return type(stock)(**{**_known(stock, sizes), **given})


def _known(stock: hf.PreTrainedConfig, sizes: dict) -> dict:
    known = stock.to_dict()
    return {key: value for key, value in sizes.items() if key in known}


def apertus1p5() -> Built:
    """An image is embedded by the codes of its patches."""
    vision = dict(codebook_size=16, embed_dim=8, latent_channels=8, base_channels=32)
    vision |= dict(channel_multiplier=[1, 1], num_res_blocks=1, attn_resolutions=[])
    offsets = dict(image_token_offset=120, audio_token_offset=136)
    model = _model("Apertus1p5", {}, vision, **offsets)

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        return dict(
            pixel_values=torch.randn(num_images, 3, 8, 8, generator=generator),
            image_sizes=torch.tensor([[8, 8]] * num_images),
        )

    return model, [START, *[IMAGE] * 16, END], pixels


def aria() -> Built:
    text = dict(moe_num_experts=4, moe_topk=2)
    model = _model("Aria", text, {}, projector_patch_to_query_dict={16: 8})
    return model, [IMAGE] * 8, _square


def aya_vision() -> Built:
    text = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    return _model("AyaVision", text, {}), [START, *[IMAGE] * 4, END], _square


def cohere2_vision() -> Built:
    text = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    model = _model("Cohere2Vision", text, {}, alignment_intermediate_size=64)
    return model, [START, *[IMAGE] * 4, END], _square


def deepseek_vl() -> Built:
    return _model("DeepseekVL", {}, {}), [IMAGE] * 16, _square


def deepseek_vl_hybrid() -> Built:
    high_res = hf.SamVisionConfig(
        **{**_known(hf.SamVisionConfig(), VISION), "window_size": 2},
        output_channels=8,
        global_attn_indexes=[1],
    )
    model = _model("DeepseekVLHybrid", {}, {}, high_res_vision_config=high_res)

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        images = _square(num_images, num_prompts, generator)
        return dict(images, high_res_pixel_values=images["pixel_values"])

    return model, [IMAGE] * 16, pixels


def ernie4_5_vl_moe() -> Built:
    text = dict(moe_intermediate_size=[32, 32], moe_num_experts=4, moe_k=2)
    text |= dict(rope_parameters=_mrope(3, 3, 2))
    return _model("Ernie4_5_VLMoe", text, {}), [START, *[IMAGE] * 24, END], _grid(588)


def cosmos3_edge() -> Built:
    model = _model("Cosmos3Edge", dict(rope_parameters=_mrope(2, 3, 3)), dict(num_patches=16))
    return model, [START, *[IMAGE] * 24, END], _grid(588)


def cosmos3_omni() -> Built:
    rope = _mrope(2, 3, 3, mrope_interleaved=True)
    model = _model("Cosmos3Omni", dict(rope_parameters=rope), dict(patch_size=16))
    return model, [START, *[IMAGE] * 24, END], _patches(16)


def deepseek_ocr2() -> Built:
    """An image is 144 learnt queries, which read its patches, and a separator."""
    sam = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=64)
    sam |= dict(output_channels=8, mlp_dim=48, window_size=2, global_attn_indexes=[0])
    sam |= dict(downsample_channels=[16, 32])
    encoder = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    encoder |= dict(num_attention_heads=4, num_key_value_heads=4, vocab_size=160)
    vision = dict(sam_config=sam, encoder_config=encoder)

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        return dict(pixel_values=torch.randn(num_images, 3, 64, 64, generator=generator))

    model = _model("DeepseekOcr2", dict(mlp_layer_types=["dense", "sparse"]), vision)
    return model, [IMAGE] * 145, pixels


def exaone4_5() -> Built:
    model = _model("Exaone4_5_", {}, dict(num_key_value_heads=2))
    return model, [START, *[IMAGE] * 24, END], _patches(14)


def cohere_compass() -> Built:
    rope = {"full_attention": _mrope(2, 3, 3)}
    text = dict(rope_parameters=rope, sliding_window=16)
    model = _model("CohereCompass", text, dict(patch_size=16))
    return model, [START, *[IMAGE] * 24, END], _patches(16)


def fast_vlm() -> Built:
    """With a ResNet in place of its vision tower, which needs timm: it too gives maps."""
    tower = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 1, 1])
    tower.hidden_size = 32
    return _model("FastVlm", {}, tower), [IMAGE] * 16, _square


def fuyu() -> Built:
    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.randn(num_images, 16, 588, generator=generator)}

    model = _model("Fuyu", {}, {}, patch_size=14, image_size=56, hidden_size=64)
    is_named_so = "pixel_values" in inspect.signature(model.forward).parameters
    name = "pixel_values" if is_named_so else "image_patches"  # before Transformers 5.20 or so
    return model, [*[IMAGE] * 16, START], pixels


def gemma4(**text) -> Built:
    vision = dict(model_type="gemma4_vision", num_key_value_heads=4, head_dim=8)
    vision |= dict(position_embedding_size=8, pooling_kernel_size=2)
    return _gemma4("Gemma4", vision, 16, 588, hidden_size_per_layer_input=8, **text)


def gemma4_vision_blocks() -> Built:
    """The larger checkpoints': tokens of an image all see each other."""
    return gemma4(use_bidirectional_attention="vision")


def gemma4_unified() -> Built:
    vision = dict(model_type="gemma4_unified_vision", mm_embed_dim=64, mm_posemb_size=8)
    vision |= dict(patch_size=7, pooling_kernel_size=2, output_proj_dims=64)
    return _gemma4("Gemma4Unified", vision, 4, 588)


def _gemma4(name: str, vision: dict, num_patches: int, patch: int, **text) -> Built:
    """Layers of full attention have heads of their own size here."""
    text |= dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    text |= dict(global_head_dim=32, vocab_size_per_layer_input=160, num_experts=None)
    model = _model(name, text, vision, audio_config=None)
    side = math.isqrt(num_patches)

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.arange(num_patches)
        where = torch.stack([index % side, index // side], -1)
        return dict(
            pixel_values=torch.rand(num_images, num_patches, patch, generator=generator),
            image_position_ids=where.expand(num_images, -1, -1),
        )

    return model, [START, *[IMAGE] * 4, END], pixels


def glm46v() -> Built:
    return _glm("Glm46V")


def glm4v_moe() -> Built:
    return _glm("Glm4vMoe")


def glm_ocr() -> Built:
    return _glm("GlmOcr")


def _glm(name: str) -> Built:
    rope = _mrope(2, 1, 1, partial_rotary_factor=0.5)
    model = _model(name, dict(rope_parameters=rope), {})
    return model, [START, *[IMAGE] * 24, END], _patches(14)


def got_ocr2() -> Built:
    vision = dict(image_size=128, patch_size=16, output_channels=16)
    vision |= dict(window_size=4, global_attn_indexes=[1])

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        return dict(pixel_values=torch.randn(num_images, 3, 128, 128, generator=generator))

    model = _model("GotOcr2", {}, vision)
    return model, [START, *[IMAGE] * 4, END], pixels


def granite_docling() -> Built:
    text = dict(attention_multiplier=0.25, embedding_multiplier=1.0, logits_scaling=1.0)
    model = _model("GraniteDocling", dict(text, residual_multiplier=1.0), dict(scale_factor=2))

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        images = _per_prompt(num_images, num_prompts, generator)
        mask = torch.ones(images["pixel_values"].shape[:2], dtype=torch.bool)
        return dict(images, pixel_attention_mask=mask)

    return model, [START, *[IMAGE] * 4, START], pixels


def granite4_vision() -> Built:
    """Tiles as in LLaVA-NeXT, of four tokens each."""
    text = dict(model_type="granite4_vision_text", attention_multiplier=0.25)
    text |= dict(num_hidden_layers=4, layer_types=["full_attention"] * 4)
    more = dict(downsample_rate="2/4", deepstack_layer_map=[[-1, 0]])
    more |= dict(spatial_target_layers=[0, 1, 2, 3])
    vision = dict(model_type="clip_vision_model", hidden_size=64)
    model = _model("Granite4Vision", text, vision, **more)
    return model, [IMAGE] * 14, tiny_models._tiles


def hunyuan_vl() -> Built:
    text = dict(rope_parameters=_mrope(2, 2, 2, 2))
    vision = dict(text_hidden_size=64, num_key_value_heads=4)
    return _model("HunYuanVL", text, vision), [IMAGE] * 30, _grid(588)


def hyperclovax_vision_v2() -> Built:
    return _model("HyperCLOVAXVisionV2", {}, {}), [START, *[IMAGE] * 24, END], _patches(14)


def idefics2() -> Built:
    perceiver = dict(hidden_size=64, resampler_n_latents=8, resampler_depth=1)
    perceiver |= dict(resampler_n_heads=4, resampler_head_dim=16, num_key_value_heads=2)
    model = _model("Idefics2", {}, {}, perceiver_config=perceiver)
    return model, [START, *[IMAGE] * 8, START], _per_prompt


def internvl_gpt_oss() -> Built:
    """Its text has a sink for each head, in layers with and without a window, and experts."""
    text = dict(TEXT, **tiny_models.TEXT, model_type="gpt_oss", sliding_window=16)
    text |= dict(layer_types=["sliding_attention", "full_attention"] * 2)
    config = hf.InternVLConfig(
        vision_config=dict(tiny_models.VISION, image_size=[56, 56], patch_size=[14, 14]),
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    model = hf.InternVLForConditionalGeneration(config)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "sinks"):
                module.sinks.copy_(torch.tensor([3.0, -2.0, 1.0, 0.0]))
    return model, [START, *[IMAGE] * 4, END], _square


def janus() -> Built:
    vq = hf.JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=16,
        latent_channels=16,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        projection_dim=64,
        image_token_embed_dim=64,
    )
    model = _model("Janus", {}, dict(projection_dim=64, num_image_tokens=16), vq_config=vq)
    return model, [START, *[IMAGE] * 16, END], _square


def lighton_ocr() -> Built:
    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        sizes = torch.tensor([[56, 56]] * num_images)
        return dict(_square(num_images, num_prompts, generator), image_sizes=sizes)

    return _model("LightOnOcr", {}, dict(head_dim=8)), [IMAGE] * 4, pixels


def llava_next_video() -> Built:
    model = _model("LlavaNextVideo", {}, {}, image_seq_length=16)
    return model, [IMAGE] * tiny_models._num_tile_tokens(model, "default"), tiny_models._tiles


def molmo2() -> Built:
    """An image is a crop of 16 patches, of which each token pools four."""
    vision = dict(
        image_size=[56, 56], num_key_value_heads=4, head_dim=8, num_position_embeddings=16
    )
    adapter = dict(hidden_size=32, intermediate_size=48, text_hidden_size=64, num_attention_heads=4)
    adapter |= dict(num_key_value_heads=4, head_dim=8, vision_feature_layer=[-1])

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        return dict(
            pixel_values=torch.randn(num_images, 16, 588, generator=generator),
            image_token_pooling=torch.arange(16 * num_images).view(-1, 4),
            image_grids=torch.tensor([[2, 2, 0, 0]] * num_images),
        )

    model = _model("Molmo2", {}, vision, adapter_config=adapter, video_token_id=IMAGE)
    return model, [START, *[IMAGE] * 4, END], pixels


def muse_glimmer() -> Built:
    return _muse("MuseGlimmer")


def muse_spark() -> Built:
    return _muse("MuseSpark")


def _muse(name: str) -> Built:
    text = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    text |= dict(layer_rope_theta=[10000.0, 0], moe_hidden_size=32)
    vision = dict(pos_emb_height=8, pos_emb_width=8, max_position_embeddings=64)
    vision |= dict(layer_types=["window_attention", "full_attention"])
    more = dict(out_hidden_size=128, projector_hidden_size=64)
    return _model(name, text, vision, **more), [START, *[IMAGE] * 24, END], _patches(14)


def ovis2() -> Built:
    model = _model(
        "Ovis2",
        {},
        dict(vocab_size=32),
        visual_indicator_token_ids=list(range(104, 109)),
        hidden_size=64,
        vocab_size=160,
    )
    return model, [104, *[IMAGE] * 16, 105], _square


def paddleocr_vl() -> Built:
    model = _model("PaddleOCRVL", dict(rope_parameters=_mrope(2, 3, 3)), {})
    return model, [START, *[IMAGE] * 24, END], _grid(3, 14, 14)


def perception_lm() -> Built:
    """With CLIP in place of its vision tower, which needs timm: both put a class token first."""
    tower = hf.CLIPVisionConfig(**_known(hf.CLIPVisionConfig(), VISION))
    tower.model_args = dict(embed_dim=32)

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        images = _square(num_images, num_prompts, generator)["pixel_values"]
        return dict(pixel_values=images[:, None])

    return _model("PerceptionLM", {}, tower), [IMAGE] * 16, pixels


def qianfan_ocr() -> Built:
    vision = dict(image_size=[56, 56], patch_size=[14, 14])
    model = _model("QianfanOCR", {}, vision, image_seq_length=4)
    return model, [START, *[IMAGE] * 4, END], _square


def qwen2_5_omni_thinker() -> Built:
    text = dict(rope_parameters=_mrope(2, 3, 3))
    model = _model("Qwen2_5OmniThinker", text, {}, vision_start_token_id=START)
    return model, [START, *[IMAGE] * 24, END], _patches(14)


def qwen3_omni_moe_thinker() -> Built:
    rope = _mrope(2, 3, 3, mrope_interleaved=True)
    text, vision = dict(rope_parameters=rope), dict(patch_size=16)
    model = _model("Qwen3OmniMoeThinker", text, vision, vision_start_token_id=START)
    return model, [START, *[IMAGE] * 24, END], _patches(16)


def qwen3_vl_moe() -> Built:
    rope = _mrope(2, 3, 3, mrope_interleaved=True)
    model = _model("Qwen3VLMoe", dict(rope_parameters=rope), dict(patch_size=16))
    return model, [START, *[IMAGE] * 24, END], _patches(16)


def step3p7() -> Built:
    text = dict(share_expert_dim=32, mlp_layer_types=["dense", "sparse"], sliding_window=16)
    model = _model("Step3p7", text, dict(max_position_embeddings=16, mlp_ratio=1.5))
    return model, [START, IMAGE, END], _square


def video_llama_3() -> Built:
    grid = _grid(588)

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        merge_sizes = torch.tensor([2] * num_images)
        return dict(grid(num_images, num_prompts, generator), image_merge_sizes=merge_sizes)

    return _model("VideoLlama3", {}, {}), [IMAGE] * 24, pixels


def video_llava() -> Built:
    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        images = _square(num_images, num_prompts, generator)["pixel_values"]
        return dict(pixel_values_images=images)

    return _model("VideoLlava", {}, {}), [IMAGE] * 16, pixels


def vipllava() -> Built:
    return _model("VipLlava", {}, {}), [IMAGE] * 16, _square


def _per_prompt(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
    images = torch.randn(num_images, 3, 56, 56, generator=generator)
    return dict(pixel_values=images.view(num_prompts, -1, 3, 56, 56))


def _grid(*patch: int) -> Pixels:
    """As `_patches`, of one frame: a grid of 8 x 12 patches, each of the shape `patch`."""

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        return dict(
            pixel_values=torch.randn(num_images * 96, *patch, generator=generator),
            image_grid_thw=torch.tensor([[1, 8, 12]] * num_images),
        )

    return pixels
