"""Where on an image each of its visual tokens looks, for families whose grid is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor

# Families that tell their grid as frames, rows and columns of patches, merged by a known factor.
GRID_THW_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")


class UnknownGridError(Exception):
    """The tokens of this model's images do not lie on a grid that can be told."""


@dataclass(frozen=True)
class ImageGrid:
    """One image of a prompt, as the model saw it.

    positions: `[rows, columns]` int64, the prompt position of the token of each cell.
    pixels: `[height, width, 3]` fp32 in [0, 1], what was fed; None where only its size is known,
        the image then fills the grid without a crop.
    """

    positions: Tensor
    pixels: Tensor | None


def image_grids(model: Any, processor: Any, inputs: Mapping[str, Tensor]) -> list[ImageGrid]:
    """The grids of a single prompt's images, in order.

    LLaVA-1.5: a square of patches an image, drawn on the pixels that were fed (its processor may
    crop). Qwen-VL and GLM-4V: `image_grid_thw`, merged; they resize without a crop.

    Args:
        inputs: as the processor made them for one sequence.

    Raises:
        UnknownGridError: for other families, saying so, and where counts do not agree.
    """
    family = model.config.model_type
    visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].cpu()
    if family == "llava":
        pixels = _fed_pixels(processor, inputs["pixel_values"])
        if len(pixels) == 0 or len(visual) % len(pixels):
            raise UnknownGridError(f"{len(visual)} visual tokens do not fill {len(pixels)} images")
        side = isqrt(len(visual) // len(pixels))
        if side * side * len(pixels) != len(visual):
            raise UnknownGridError(f"{len(visual) // len(pixels)} tokens an image are no square")
        positions = visual.view(len(pixels), side, side)
        return [ImageGrid(p, x) for p, x in zip(positions, pixels, strict=True)]
    if family in GRID_THW_FAMILIES:
        merge = model.config.vision_config.spatial_merge_size
        shapes = [(t, h // merge, w // merge) for t, h, w in inputs["image_grid_thw"].tolist()]
        counts = [t * h * w for t, h, w in shapes]
        if sum(counts) != len(visual):
            raise UnknownGridError(f"{len(visual)} visual tokens, but {sum(counts)} grid cells")
        pieces = visual.split(counts)
        frames = [p.view(shape) for p, shape in zip(pieces, shapes, strict=True)]
        return [ImageGrid(frame, None) for image in frames for frame in image]
    raise UnknownGridError(
        f"the image grid of {family!r} models cannot be recovered from their inputs (tiles,"
        " crops or resampled tokens); it is known for llava, " + ", ".join(GRID_THW_FAMILIES)
    )


def _fed_pixels(processor: Any, pixel_values: Tensor) -> list[Tensor]:
    """`[height, width, 3]` in [0, 1] of each image, with the processor's normalisation undone."""
    mean = torch.tensor(processor.image_processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_processor.image_std)[:, None, None]
    images = pixel_values.float().cpu() * std + mean
    return [image.permute(1, 2, 0).clamp(0, 1) for image in images]
