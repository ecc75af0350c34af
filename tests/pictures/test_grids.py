"""Which prompt position shows which part of an image, family by family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vlcache_triton.apps.formreader import (
    chat,
    draw_dialogue,
    encode_chats,
    render,
)
from vlcache_triton.apps.pictures import UnknownGridError, image_grids
from vlcache_triton.apps.pictures.grids import GRID_THW_FAMILIES

IMAGE = 9


def model_of(family: str, merge: int = 2) -> SimpleNamespace:
    """What image_grids reads of a model."""
    vision = SimpleNamespace(spatial_merge_size=merge)
    config = SimpleNamespace(model_type=family, image_token_id=IMAGE, vision_config=vision)
    return SimpleNamespace(config=config)


def processor_of(mean: float = 0.5, std: float = 0.25) -> SimpleNamespace:
    normalisation = SimpleNamespace(image_mean=[mean] * 3, image_std=[std] * 3)
    return SimpleNamespace(image_processor=normalisation)


def prompt(*counts: int) -> torch.Tensor:
    """Token ids `[1, length]`: two of text, then each image's tokens and one of text."""
    ids = [1, 2]
    for count in counts:
        ids += [IMAGE] * count + [3]
    return torch.tensor([ids])


def test_llava_s_images_are_squares_of_patches() -> None:
    """Row by row, each image behind the other, on the pixels that were fed."""
    pixels = torch.rand(2, 3, 8, 8)
    inputs = {"input_ids": prompt(16, 16), "pixel_values": (pixels - 0.5) / 0.25}
    first, second = image_grids(model_of("llava"), processor_of(), inputs)
    assert first.positions.tolist() == torch.arange(2, 18).view(4, 4).tolist()
    assert second.positions.tolist() == torch.arange(19, 35).view(4, 4).tolist()
    for grid, image in zip((first, second), pixels, strict=True):
        assert grid.pixels is not None
        torch.testing.assert_close(grid.pixels, image.permute(1, 2, 0))


@pytest.mark.parametrize("counts", [(15,), (16, 15), (12,), ()])
def test_llava_s_tokens_that_fill_no_squares(counts: tuple[int, ...]) -> None:
    pixels = torch.rand(len(counts), 3, 8, 8)
    inputs = {"input_ids": prompt(*counts), "pixel_values": pixels}
    if counts:
        with pytest.raises(UnknownGridError, match=r"visual tokens|no square"):
            image_grids(model_of("llava"), processor_of(), inputs)
    else:
        with pytest.raises(UnknownGridError, match="0 images"):
            image_grids(model_of("llava"), processor_of(), inputs)


@pytest.mark.parametrize("family", GRID_THW_FAMILIES)
def test_merged_patches_of_images_of_two_sizes(family: str) -> None:
    """[frames, rows, columns] of patches, merged 2 by 2; frames are images of their own."""
    grid = torch.tensor([[1, 4, 6], [2, 2, 8]])
    inputs = {"input_ids": prompt(6, 8), "image_grid_thw": grid}
    grids = image_grids(model_of(family), None, inputs)
    assert [tuple(x.positions.shape) for x in grids] == [(2, 3), (1, 4), (1, 4)]
    assert grids[0].positions.tolist() == [[2, 3, 4], [5, 6, 7]]
    assert grids[1].positions.tolist() == [[9, 10, 11, 12]]
    assert grids[2].positions.tolist() == [[13, 14, 15, 16]]
    assert all(x.pixels is None for x in grids)


def test_another_factor_of_merging() -> None:
    inputs = {"input_ids": prompt(4), "image_grid_thw": torch.tensor([[1, 6, 6]])}
    (grid,) = image_grids(model_of("glm4v", merge=3), None, inputs)
    assert grid.positions.tolist() == [[2, 3], [4, 5]]


def test_counts_that_do_not_agree() -> None:
    inputs = {"input_ids": prompt(7), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    with pytest.raises(UnknownGridError, match="7 visual tokens, but 6 grid cells"):
        image_grids(model_of("qwen2_5_vl"), None, inputs)


@pytest.mark.parametrize("family", ["llava_next", "smolvlm", "gemma3", "internvl"])
def test_other_families_are_named(family: str) -> None:
    """With what is known instead, so that nobody takes a wrong picture for a right one."""
    with pytest.raises(UnknownGridError, match=rf"{family}.*cannot be recovered.*llava, qwen2_vl"):
        image_grids(model_of(family), None, {"input_ids": prompt(16)})


def test_the_embedded_model_s_pages(form_reader) -> None:
    """Real inputs: every visual token lies on a grid once, and the pixels are the page's."""
    model, processor = form_reader
    form = draw_dialogue(seed=3, tasks=["value"])
    page = render(form.pages[0])
    inputs = encode_chats(processor, [chat([page, page], [form.questions[0].text])])
    grids = image_grids(model, processor, inputs)
    visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    assert torch.equal(torch.cat([x.positions.flatten() for x in grids]), visual)
    first, second = (x.pixels for x in grids)
    assert first is not None and second is not None and torch.equal(first, second)
    side = first.shape[0]
    shown = torch.tensor(list(page.resize((side, side)).convert("RGB").tobytes())) / 255
    assert (first.flatten() - shown).abs().mean() < 0.05
