"""The choices of VLCacheConfig and the odd prompts, each against the masked full cache."""

from __future__ import annotations

import oracle
import pytest
from checks import GREEDY, STOCK_ATOL, assert_compressed_run, assert_kept, assert_same_run
from families import LONG, PICTURE, SHORT

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.names import CACHE

TEXT_ONLY = [1, *range(30, 60)]
SEVERAL_PICTURES = [1, PICTURE, 5, 6, PICTURE, 7, 8, PICTURE, 9, 10, 11, 12]
PICTURE_AT_THE_END = [1, 5, 6, 7, 8, 9, PICTURE]

OPTIONS = {
    "uniform": dict(allocation="uniform"),
    "pyramid": dict(allocation="pyramid"),
    "layer": dict(granularity="layer"),
    "smoothing": dict(smoothing=3),
    "smoothing over more than there is": dict(smoothing=71),
    "max_query_rows": dict(max_query_rows=3),
    "max_query_rows of one": dict(max_query_rows=1),
    "maxima": dict(row_reduction="max", group_reduction="max", smoothing=3),
    "maximum over rows": dict(row_reduction="max"),
    "maximum over the group": dict(group_reduction="max", granularity="layer"),
    "threshold": dict(threshold=0.2),
    "recent_fraction": dict(recent_fraction=0.5),
    "all recent": dict(recent_fraction=1.0),
    "none recent but the last": dict(recent_fraction=0.0),
    "bounds": dict(min_layer_budget=0.38, max_layer_budget=0.45),
    "small": dict(budget=0.1),
    "tokens": dict(budget=10),
    "one token": dict(budget=1e-9, min_layer_budget=0.0),
    "more tokens than there are": dict(budget=1000),
    "almost all": dict(budget=0.99),
    "a row for the rest": dict(remainder="mean"),
    "a row for the rest, of a layer": dict(remainder="mean", granularity="layer", smoothing=3),
    "a row for the rest, uniform": dict(remainder="mean", allocation="uniform"),
    "a row for the rest, small": dict(remainder="mean", budget=0.1),
    "a row for the rest, one token": dict(remainder="mean", budget=0.02, min_layer_budget=0.0),
    "a row for the rest, one beside it": dict(remainder="mean", budget=2),
    "a row for the rest, which is small": dict(remainder="mean", budget=0.99),
    "a row for the rest, which is nothing": dict(remainder="mean", budget=1000),
}


def run(family, inputs, config):
    with vl_cache(family.model, config) as session:
        return session, family.model.generate(**inputs, **GREEDY)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_each_option_equals_the_masked_full_cache(family, option):
    inputs = family.inputs(LONG, SHORT)
    config = VLCacheConfig(**dict(dict(budget=0.4), **option))
    session, out = run(family, inputs, config)
    assert_compressed_run(family, inputs, config, session, out)


def test_keywords_are_the_fields_of_the_configuration(family):
    inputs = family.inputs(LONG)
    config = VLCacheConfig(budget=0.3, granularity="layer", max_query_rows=4)
    with vl_cache(family.model, budget=0.3, granularity="layer", max_query_rows=4) as session:
        out = family.model.generate(**inputs, **GREEDY)
    assert_compressed_run(family, inputs, config, session, out)


@pytest.mark.parametrize("budget", [7, 12])
def test_an_absolute_budget_is_the_mean_over_the_layers(family, budget):
    session, _ = run(family, family.inputs(LONG, SHORT), VLCacheConfig(budget=budget))
    assert session.cache.plan.keep.sum(0).tolist() == [budget * 4, budget * 4]


def test_a_shared_set_is_the_same_for_all_heads(family):
    session, _ = run(family, family.inputs(LONG), VLCacheConfig(budget=0.4, granularity="layer"))
    for layer in range(4):
        first, second = session.cache.plan.kept_positions(layer, 0).tolist()
        assert first == second


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"], indirect=True)
@pytest.mark.parametrize("prompts", [[SEVERAL_PICTURES], [SEVERAL_PICTURES, SHORT]])
def test_post_vision_rows_begin_after_the_last_of_several_pictures(family, prompts):
    inputs = family.inputs(*prompts)
    config = VLCacheConfig(budget=0.4)
    session, out = run(family, inputs, config)
    assert_compressed_run(family, inputs, config, session, out)


@pytest.mark.parametrize("prompts", [[PICTURE_AT_THE_END], [PICTURE_AT_THE_END, LONG]])
def test_a_picture_at_the_end_leaves_the_last_row_as_query(family, prompts):
    inputs = family.inputs(*prompts)
    config = VLCacheConfig(budget=0.4)
    session, out = run(family, inputs, config)
    assert_compressed_run(family, inputs, config, session, out)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
def test_a_text_prompt_is_left_alone(family):
    inputs = family.inputs(TEXT_ONLY, TEXT_ONLY[:9])
    expected = family.model.generate(**inputs, **GREEDY)
    session, out = run(family, inputs, VLCacheConfig(budget=0.4))
    assert_same_run(out, expected, STOCK_ATOL)
    assert session.report() is None


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("window", [1, 6, 100])
def test_a_text_prompt_is_compressed_by_its_last_rows(family, window):
    inputs = family.inputs(TEXT_ONLY, TEXT_ONLY[:9])
    config = VLCacheConfig(budget=0.4, text_window=window)
    session, out = run(family, inputs, config)
    assert_compressed_run(family, inputs, config, session, out)


@pytest.mark.parametrize("window", [None, 5])
def test_a_text_prompt_beside_one_with_a_picture(family, window):
    inputs = family.inputs(LONG, TEXT_ONLY)
    config = VLCacheConfig(budget=0.4, text_window=window)
    session, out = run(family, inputs, config)
    assert_compressed_run(family, inputs, config, session, out)


def test_a_batch_is_compressed_as_its_prompts_alone(family):
    together = family.inputs(LONG, SHORT)
    config = VLCacheConfig(budget=0.4)
    _, both = run(family, together, config)
    alone = {k: v[1:] for k, v in together.items()}
    pads = int((alone["attention_mask"] == 0).sum())
    alone |= {k: alone[k][:, pads:] for k in ("input_ids", "attention_mask")}
    _, single = run(family, alone, config)
    for layer in range(4):
        assert (
            both[CACHE].plan.kept_positions(layer, 1).tolist()
            == single[CACHE].plan.kept_positions(layer, 0).tolist()
        )


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
def test_a_missing_attention_mask_means_no_pads(family):
    inputs = family.inputs(LONG)
    config = VLCacheConfig(budget=0.4)
    unmasked = {k: v for k, v in inputs.items() if k != "attention_mask"}
    session, out = run(family, unmasked, config)
    assert_compressed_run(family, inputs, config, session, out)


def test_each_generate_call_has_a_cache_of_its_own(family):
    config = VLCacheConfig(budget=0.4)
    prompts = [family.inputs(prompt) for prompt in (LONG, SHORT, SEVERAL_PICTURES)]
    kept = [oracle.kept_tokens(family, inputs, config) for inputs in prompts]
    caches = []
    with vl_cache(family.model, config) as session:
        for inputs in prompts:
            out = family.model.generate(**inputs, **GREEDY)
            assert out[CACHE] is session.cache
            caches.append(session.cache)
    for cache, inputs, expected in zip(caches, prompts, kept, strict=True):
        assert_kept(cache, expected, inputs)
