"""Tiny models whose prompts hold videos: those of the other files, given frames."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import tiny_models
import torch
from further_models import (
    cohere_compass,
    cosmos3_edge,
    cosmos3_omni,
    ernie4_5_vl_moe,
    exaone4_5,
    glm4v_moe,
    glm46v,
    glm_ocr,
    hyperclovax_vision_v2,
    llava_next_video,
    molmo2,
    perception_lm,
    qwen2_5_omni_thinker,
    qwen3_omni_moe_thinker,
    qwen3_vl_moe,
    video_llama_3,
    video_llava,
)
from tiny_models import END, IMAGE, START, VIDEO, Built
from torch import Tensor


def llava_next_video_video() -> Built:
    return llava_next_video()[0], [VIDEO] * 12, _frames


def perception_lm_video() -> Built:
    return perception_lm()[0], [VIDEO] * 48, _frames


def video_llava_video() -> Built:
    return video_llava()[0], [VIDEO] * 51, _frames


def molmo2_video() -> Built:
    """Two frames, in the place of two images."""

    def pixels(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        return dict(
            pixel_values_videos=torch.randn(2 * num_images, 16, 588, generator=generator),
            video_token_pooling=torch.arange(32 * num_images).view(-1, 4),
            video_grids=torch.tensor([[2, 2, 2]] * num_images),
        )

    return molmo2()[0], [START, *[IMAGE] * 8, END], pixels


def llava_onevision_video() -> Built:
    """Four tokens a frame, and one that ends the video."""
    return tiny_models.llava_onevision()[0], [VIDEO] * 13, _frames


def video_llama_3_video() -> Built:
    model, video, pixels = _video(video_llama_3)

    def videos(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        merge_sizes = torch.tensor([2] * num_images)
        return dict(pixels(num_images, num_prompts, generator), video_merge_sizes=merge_sizes)

    return model, video, videos


def ernie4_5_vl_moe_video() -> Built:
    """Its two grids are merged into one."""
    model, _, videos = _video(ernie4_5_vl_moe)
    return model, [START, *[VIDEO] * 24, END], videos


def _video(builder: Callable[[], Built]) -> Built:
    """A video of two grids, each with the tokens of one image: timestamps may stand in between."""
    model, image, pixels = builder()

    def videos(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        frames = pixels(2 * num_images, num_prompts, generator)
        return dict(
            pixel_values_videos=frames["pixel_values"],
            video_grid_thw=torch.tensor([[2, 8, 12]] * num_images),
        )

    return model, [VIDEO if token == IMAGE else token for token in image * 2], videos


def _whole_video(builder: Callable[[], Built], **each: float) -> Built:
    """A video of two grids in one run of tokens; `each`: what every video has to be given."""
    model, _, videos = _video(builder)

    def more(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
        given = {key: torch.tensor([value] * num_images) for key, value in each.items()}
        return dict(videos(num_images, num_prompts, generator), **given)

    return model, [START, *[VIDEO] * 48, END], more


def _glm_video(builder: Callable[[], Built]) -> Built:
    """GLM has its frames stand where images do; their kind is in `mm_token_type_ids` alone."""
    model, _, videos = _video(builder)
    return model, builder()[1] * 2, videos


def _frames(num_images: int, num_prompts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Videos of three frames."""
    return dict(pixel_values_videos=torch.randn(num_images, 3, 3, 56, 56, generator=generator))


qwen2_vl_video = partial(_whole_video, tiny_models.qwen2_vl)
qwen2_5_vl_video = partial(_whole_video, tiny_models.qwen2_5_vl)
qwen2_5_omni_thinker_video = partial(_whole_video, qwen2_5_omni_thinker, video_second_per_grid=1.0)
exaone4_5_video = partial(_whole_video, exaone4_5)
hyperclovax_vision_v2_video = partial(_whole_video, hyperclovax_vision_v2)
qwen3_vl_video = partial(_video, tiny_models.qwen3_vl)
qwen3_vl_moe_video = partial(_video, qwen3_vl_moe)
qwen3_omni_moe_thinker_video = partial(
    _whole_video, qwen3_omni_moe_thinker, video_second_per_grid=1.0
)
cohere_compass_video = partial(_video, cohere_compass)
cosmos3_edge_video = partial(_video, cosmos3_edge)
cosmos3_omni_video = partial(_video, cosmos3_omni)
glm4v_video = partial(_glm_video, tiny_models.glm4v)
glm46v_video = partial(_glm_video, glm46v)
glm4v_moe_video = partial(_glm_video, glm4v_moe)
glm_ocr_video = partial(_glm_video, glm_ocr)
