"""Tiny randomly initialised vision-language models, one builder for each family.

A builder returns the model, the token ids that stand for one image, and a function
`pixels(num_images, num_prompts, generator)` that draws the vision inputs of that many images.
Token ids 1 to 99 are text, IMAGE is the image placeholder, 101 and above are other special tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

IMAGE, VIDEO, START, END = 100, 101, 102, 103
VOCAB_SIZE = 160
Pixels = Callable[[int, int, torch.Generator], dict[str, Tensor]]
Built = tuple[hf.PreTrainedModel, list[int], Pixels]

TEXT = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
CLIP = dict(VISION, model_type="clip_vision_model", image_size=56, patch_size=14, projection_dim=32)
SIGLIP = dict(VISION, model_type="siglip_vision_model", image_size=56, patch_size=14)
PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def _mrope(*section: int, **more) -> dict:
    return dict(rope_type="default", mrope_section=list(section), rope_theta=10000.0, **more)


def _square(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
    return dict(pixel_values=torch.randn(num_images, 3, 56, 56, generator=generator))


def _tiles(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Base view and two tiles of an image whose best resolution is 56 x 112."""
    return dict(
        pixel_values=torch.randn(num_images, 3, 3, 56, 56, generator=generator),
        image_sizes=torch.tensor([[50, 100]] * num_images),
    )


def _num_tile_tokens(model: hf.PreTrainedModel, strategy: str) -> int:
    images = _tiles(1, 1, torch.Generator())
    with torch.no_grad():
        features = model.model.get_image_features(
            **images, vision_feature_layer=-1, vision_feature_select_strategy=strategy
        ).pooler_output
    return len(features[0])


def _patches(patch_size: int, rows: int = 8, columns: int = 12) -> Pixels:
    """The Qwen processors' format: flat patches of two frames, and a (t, h, w) grid."""

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = 3 * 2 * patch_size**2
        return dict(
            pixel_values=torch.randn(num_images * rows * columns, size, generator=generator),
            image_grid_thw=torch.tensor([[1, rows, columns]] * num_images),
        )

    return pixels


def llava(**text) -> Built:
    config = hf.LlavaConfig(
        vision_config=CLIP,
        text_config=dict(TEXT, model_type="llama", **text),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    return hf.LlavaForConditionalGeneration(config), [IMAGE] * 16, _square


def llava_next() -> Built:
    config = hf.LlavaNextConfig(
        vision_config=CLIP,
        text_config=dict(TEXT, model_type="llama"),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    model = hf.LlavaNextForConditionalGeneration(config)
    return model, [IMAGE] * _num_tile_tokens(model, "default"), _tiles


def llava_onevision() -> Built:
    config = hf.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=dict(TEXT, model_type="qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    model = hf.LlavaOnevisionForConditionalGeneration(config)
    return model, [IMAGE] * _num_tile_tokens(model, "full"), _tiles


def _qwen(config: type, model: type, vision: dict, rope: dict, patch_size: int, **text) -> Built:
    built = config(
        vision_config=dict(depth=2, num_heads=4, patch_size=patch_size, **vision),
        text_config=dict(TEXT, rope_parameters=rope, **text),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return model(built), [START, *[IMAGE] * 24, END], _patches(patch_size)


def qwen2_vl() -> Built:
    vision = dict(embed_dim=32, hidden_size=64, mlp_ratio=2, spatial_merge_size=2)
    classes = hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration
    return _qwen(*classes, vision, _mrope(2, 3, 3), 14)


def qwen2_5_vl() -> Built:
    vision = dict(hidden_size=32, intermediate_size=48, out_hidden_size=64, spatial_merge_size=2)
    vision |= dict(window_size=56, fullatt_block_indexes=[1])
    classes = hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration
    return _qwen(*classes, vision, _mrope(2, 3, 3), 14)


def qwen3_vl() -> Built:
    vision = dict(hidden_size=32, intermediate_size=48, out_hidden_size=64, spatial_merge_size=2)
    vision |= dict(deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
    classes = hf.Qwen3VLConfig, hf.Qwen3VLForConditionalGeneration
    rope = _mrope(2, 3, 3, mrope_interleaved=True)
    return _qwen(*classes, vision, rope, 16, head_dim=16)


def smolvlm(config: type = hf.SmolVLMConfig, model: type | None = None) -> Built:
    built = config(
        vision_config=dict(VISION, image_size=56, patch_size=14),
        text_config=dict(TEXT, model_type="llama"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        images = torch.randn(num_images, 3, 56, 56, generator=generator)
        return dict(pixel_values=images.view(num_prompts, -1, 3, 56, 56))

    model = model or hf.SmolVLMForConditionalGeneration
    return model(built), [START, *[IMAGE] * 4, START], pixels


def idefics3() -> Built:
    return smolvlm(hf.Idefics3Config, hf.Idefics3ForConditionalGeneration)


def internvl() -> Built:
    config = hf.InternVLConfig(
        vision_config=dict(VISION, image_size=[56, 56], patch_size=[14, 14]),
        text_config=dict(TEXT, model_type="qwen2"),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return hf.InternVLForConditionalGeneration(config), [START, *[IMAGE] * 4, END], _square


def mistral3() -> Built:
    config = hf.Mistral3Config(
        vision_config=dict(VISION, model_type="pixtral", head_dim=8, image_size=112, patch_size=14),
        text_config=dict(TEXT, model_type="mistral", head_dim=16, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        sizes = torch.tensor([[56, 56]] * num_images)
        return dict(_square(num_images, num_prompts, generator), image_sizes=sizes)

    # Rows of the image end in [IMG_BREAK], its last row in [IMG_END].
    image = [IMAGE, IMAGE, START, IMAGE, IMAGE, END]
    return hf.Mistral3ForConditionalGeneration(config), image, pixels


def glm4v() -> Built:
    config = hf.Glm4vConfig(
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=4,
            out_hidden_size=64,
            patch_size=14,
            spatial_merge_size=2,
            image_size=112,
        ),
        text_config=dict(TEXT, rope_parameters=_mrope(2, 1, 1, partial_rotary_factor=0.5)),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=104,
        video_end_token_id=105,
    )
    model = hf.Glm4vForConditionalGeneration(config)
    return model, [START, *[IMAGE] * 24, END], _patches(14)


def gemma3() -> Built:
    layer_types = ["sliding_attention", "full_attention"] * 2
    config = hf.Gemma3Config(
        vision_config=SIGLIP,
        text_config=dict(
            TEXT, head_dim=16, query_pre_attn_scalar=4, sliding_window=16, layer_types=layer_types
        ),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    model = hf.Gemma3ForConditionalGeneration(config)
    # Zeros, as it comes: images would all be the same.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model, [START, *[IMAGE] * 16, END], _square


def llama4() -> Built:
    config = hf.Llama4Config(
        vision_config=dict(
            VISION,
            intermediate_size=128,
            image_size=56,
            patch_size=14,
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
        ),
        text_config=dict(
            TEXT,
            head_dim=16,
            intermediate_size_mlp=96,
            num_local_experts=2,
            attention_chunk_size=16,
            layer_types=["chunked_attention", "full_attention"] * 2,
            no_rope_layers=[1, 0] * 2,
            floor_scale=8,  # so that the temperature of the layers without RoPE matters here
        ),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    # Llama4 of Transformers 5.24.0 fails in its own forward: it reads this of its text model's
    # output, which has none.
    MoeCausalLMOutputWithPast.image_outputs = None
    return hf.Llama4ForConditionalGeneration(config), [START, *[IMAGE] * 4, END], _square
