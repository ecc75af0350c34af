"""Policies that tell text from what is visual, against their papers' formulas."""

from __future__ import annotations

import pytest
import torch
from prompts import REFERENCE, Layer, attention, compress, make_layers, make_prompt
from ranked import CONFIG, IMAGE, KEEP, LENGTH, POST_VISION, SHARPNESS, best, kept, run

from vlcache_triton import VLCacheConfig
from vlcache_triton.pool.compress import PromptCompressor
from vlcache_triton.recipe.policies import aircache, tgv_kv

TEXT = LENGTH - (IMAGE.stop - IMAGE.start)  # tokens: 5 before the image, 12 behind
ROOMY = VLCacheConfig(budget=0.4)  # 24 tokens a head


def some_look_at_the_image(layers: list[Layer]) -> list[Layer]:
    """The same, but layers differ in what they attend to it."""
    for layer, factor in zip(layers, (0.2, 2.0, 0.5, 1.5), strict=True):
        layer.k[IMAGE] *= factor
    return layers


@pytest.mark.parametrize("config", [CONFIG, ROOMY], ids=["text does not fit", "text fits"])
def test_tgv_kv_is_the_published_code(config):
    """Its `_prefill`, but that text is ranked by the rows behind the image."""
    layers = some_look_at_the_image(make_layers(make_prompt([LENGTH], [POST_VISION]), SHARPNESS))
    plan, _, _ = run(tgv_kv(sinks=2), config, layers=layers)
    assert plan.prompt.query_rows == (POST_VISION,)
    to_image = []
    for i, layer in enumerate(layers):
        maps = attention(plan.prompt, layer, 0).mean(0)  # [rows, length]
        text_to_text = maps[:, IMAGE.stop :].sum(0)
        weights = text_to_text / torch.arange(1, POST_VISION + 1).flip(0)
        weighted = maps * weights[:, None]
        scores = weighted.sum(0)
        scores[: IMAGE.start] += 100
        scores[IMAGE.stop :] += 100
        scores[:2] = torch.inf  # start_size
        to_image.append(float(maps[:, IMAGE].sum()))
        count = int(plan.head_keep[i, 0, 0])
        expected = best(scores.tolist(), count - 1, 0, LENGTH - 1)
        assert kept(plan, i, 0) == kept(plan, i, 1) == expected
    total = round(config.budget * LENGTH) * len(layers)
    assert int(plan.head_keep[..., 0].sum()) == total
    for count, share in zip(plan.head_keep[:, 0, 0].tolist(), to_image, strict=True):
        assert abs(count - total * share / sum(to_image)) <= 1
    assert plan.head_keep.unique().numel() > 1


def skewness(x: torch.Tensor) -> float:
    n, mean = len(x), float(x.mean())
    std = (sum((v - mean) ** 2 for v in x.tolist()) / (n - 1)) ** 0.5
    return n / ((n - 1) * (n - 2)) * sum(((v - mean) / std) ** 3 for v in x.tolist())


@pytest.mark.parametrize("relevance", [0.9, 0.3])
def test_aircache_is_its_papers_formulas(relevance):
    layers = some_look_at_the_image(make_layers(make_prompt([LENGTH], [POST_VISION]), SHARPNESS))
    plan, _, _ = run(aircache(relevance), ROOMY, layers=layers)
    strengths, skews, numbers = [], [], []
    for i, layer in enumerate(layers):
        maps = attention(plan.prompt, layer, 0)  # [num_heads, rows, length]
        last = maps.mean(0)[-1, IMAGE.stop :]
        elite = (last >= relevance * last.max()).nonzero()[:, 0]
        numbers.append(len(elite))
        scores = maps[:, elite].mean(1).view(2, 2, LENGTH).mean(1)
        importance = scores.mean(0)[IMAGE]
        strengths.append(float(importance.sum()))
        skews.append(max(skewness(importance), 0.0))
        for head in range(2):
            row = scores[head].clone()
            row[: IMAGE.start] += 100
            row[IMAGE.stop :] += 100
            count = int(plan.head_keep[i, 0, head])
            assert count > TEXT
            assert kept(plan, i, head) == best(row.tolist(), count - 1, 0, LENGTH - 1)
    rest = (24 - TEXT) * len(layers)
    visual = (plan.head_keep[:, 0, 0] - TEXT).tolist()
    assert sum(visual) == rest
    for got, strength, skew in zip(visual, strengths, skews, strict=True):
        wanted = rest * (strength / sum(strengths) + skew / sum(skews)) / 2
        assert abs(got - wanted) <= 1.01
    assert len(set(visual)) > 1 and max(numbers) > 1


def test_aircache_shares_evenly_where_text_alone_fills_the_budget():
    plan = run(aircache(), CONFIG)[0]
    assert plan.head_keep.unique().tolist() == [KEEP]
    for layer in range(4):
        assert not set(kept(plan, layer, 0)) & set(range(IMAGE.start, IMAGE.stop))


@pytest.mark.parametrize("policy", [tgv_kv(), aircache()], ids=lambda policy: policy.name)
def test_a_prompt_that_does_not_say_what_is_visual_is_refused(policy):
    prompt = make_prompt([20], [4])
    compressor = PromptCompressor(prompt, 1, policy.configure(CONFIG), REFERENCE, policy)
    with pytest.raises(ValueError, match="is_visual: got None"):
        compress(compressor, make_layers(prompt, [1.0]))
