"""Every family that is tested: lossless at budget 1.0, the masked full cache below it."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from checks import (
    GREEDY,
    STOCK_ATOL,
    assert_compressed_run,
    assert_same_run,
    logits,
)
from families import FURTHER, HYBRID, LONG, PICTURE, SHORT, SUPPORTED, VIDEOS
from tiny_models import VIDEO

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import vl_cache

BATCHES = {"one": [LONG], "padded": [LONG, SHORT]}
every_family = pytest.mark.parametrize("family", SUPPORTED, indirect=True)
and_further_ones = pytest.mark.parametrize(
    "family", [*SUPPORTED, *FURTHER, *HYBRID, *VIDEOS], indirect=True
)
every_batch = pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)


@and_further_ones
@every_batch
def test_a_full_budget_is_the_stock_model(family, prompts):
    inputs = family.inputs(*prompts)
    expected = family.model.generate(**inputs, **GREEDY)
    with vl_cache(family.model, budget=1.0) as session:
        out = family.model.generate(**inputs, **GREEDY)
    assert_same_run(out, expected, STOCK_ATOL)
    assert session.report() is None
    assert not session.cache.is_compressed


@and_further_ones
@every_batch
def test_a_compressed_run_equals_the_masked_full_cache(family, prompts):
    inputs = family.inputs(*prompts)
    config = VLCacheConfig(budget=0.4)
    with vl_cache(family.model, config, backend="reference") as session:
        out = family.model.generate(**inputs, **GREEDY)
    assert_compressed_run(family, inputs, config, session, out)


@every_family
def test_so_does_one_on_the_triton_kernels(family):
    """Three tokens: without a GPU the kernels run in Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = copy.deepcopy(family.model).to(device)
    inputs = family.inputs(LONG, SHORT)
    config = VLCacheConfig(budget=0.4)
    with vl_cache(model, config, backend="triton") as session:
        on_device = {k: v.to(device) for k, v in inputs.items()}
        out = model.generate(**on_device, **dict(GREEDY, max_new_tokens=3))
    assert_compressed_run(family, inputs, config, session, out)


@and_further_ones
def test_what_is_evicted_matters_to_these_models(family):
    """Without this, equality with the masked full cache would prove nothing."""
    inputs = family.inputs(LONG)
    expected = logits(family.model.generate(**inputs, **GREEDY))
    with vl_cache(family.model, budget=0.4):
        out = logits(family.model.generate(**inputs, **GREEDY))
    torch.testing.assert_close(out[:, 0], expected[:, 0], atol=STOCK_ATOL, rtol=0)  # the prefill
    assert (out[:, 1] - expected[:, 1]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["gemma3", "llama4"], indirect=True)
def test_layers_with_a_window_keep_their_own_cache(family):
    with vl_cache(family.model, budget=0.4) as session:
        family.model.generate(**family.inputs(LONG, SHORT), **GREEDY)
        for layer in (0, 2):
            assert session.cache.layers[layer].is_sliding
    assert session.report().layers == [1, 3]


@every_family
def test_layers_differ_in_sparsity_and_budget(family):
    with vl_cache(family.model, budget=0.4) as session:
        family.model.generate(**family.inputs(LONG), **GREEDY)
    report = session.report()
    sparsities = [layer[0] for layer in report.sparsity]
    assert len(set(sparsities)) == len(report.layers)
    assert all(0 < sparsity < 1 for sparsity in sparsities)
    order = sorted(range(len(sparsities)), key=lambda row: sparsities[row])
    kept = [report.kept[row][0] for row in order]
    assert kept == sorted(kept, reverse=True)  # the sparser a layer, the fewer tokens it keeps


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_video_tokens_are_vision_tokens(family):
    """Post-vision rows begin after the video, which lies behind the image."""
    inputs = family.inputs([1, 5, PICTURE, 6, PICTURE, 7, 8, 9, 10])
    video = _second_picture_becomes_a_video(inputs, family)
    config = VLCacheConfig(budget=0.4)
    with vl_cache(family.model, config) as session:
        out = family.model.generate(**video, **GREEDY)
    assert_compressed_run(family, video, config, session, out)
    length = video["input_ids"].shape[1]  # behind the video: its end token and four of text
    assert oracle.query_rows(family, video, 0, config) == range(length - 5, length)


def _second_picture_becomes_a_video(inputs, family):
    video = dict(inputs)
    pixels, grid = video.pop("pixel_values"), video.pop("image_grid_thw")
    half = len(pixels) // 2
    video |= dict(pixel_values=pixels[:half], image_grid_thw=grid[:1])
    video |= dict(pixel_values_videos=pixels[half:], video_grid_thw=grid[1:])
    ids, types = inputs["input_ids"].clone(), inputs["mm_token_type_ids"].clone()
    second = types[0].nonzero().flatten()[family.image.count(family.image[1]) :]
    ids[0, second], types[0, second] = VIDEO, 2
    return video | dict(input_ids=ids, mm_token_type_ids=types)
