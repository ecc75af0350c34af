"""Images are found where each model has them, or it is said that they are not."""

from __future__ import annotations

import dataclasses
import warnings
from types import SimpleNamespace

import oracle
import pytest
import torch
import unusual_models
from checks import GREEDY, ORACLE_ATOL, assert_compressed_run, assert_kept
from families import LONG, PICTURE
from transformers import DynamicCache
from transformers import Phi4MultimodalConfig as Phi4Config

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import visual, vl_cache
from vlcache_triton.integrations.transformers.names import CACHE

CONFIG = VLCacheConfig(budget=0.4)
PREFIX = [1, 40, 41, 42, 43, 44]
REST = [6, PICTURE, 7, 8, 9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        (dict(image_token_id=5), [5]),
        (dict(image_token_index=5, video_token_index=6), [5, 6]),
        (dict(image_token_id=None, vision_config=SimpleNamespace(image_token_id=7)), [7]),
        (dict(vocabulary_map={"<image>": 8, "a": 1}), [8]),
        (dict(vocabulary_map=None), []),
    ],
)
def test_where_configurations_name_visual_ids(config, ids):
    assert visual.visual_ids(SimpleNamespace(**config)) == ids


def test_the_id_of_phi4_multimodal():
    config = Phi4Config()
    assert visual.visual_ids(config) == [config.vision_config.image_token_id]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
def test_an_id_in_the_vision_config(family, monkeypatch):
    inputs = family.inputs(LONG)
    inputs.pop("mm_token_type_ids", None)
    kept = oracle.kept_tokens(family, inputs, CONFIG)
    config = family.model.config
    monkeypatch.setattr(config.vision_config, "image_token_id", 100, raising=False)
    monkeypatch.setattr(visual, "ID_NAMES", ("image_token_id",))
    monkeypatch.setattr(type(config), "model_type", "renamed")
    with vl_cache(family.model, CONFIG), torch.no_grad():
        assert visual.visual_ids(config) == [100]
        assert_kept(family.model(**inputs)[CACHE], kept, inputs)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"], indirect=True)
@torch.no_grad()
def test_the_model_within(family):
    """`model.model(...)`, which heads and embeddings are made with."""
    inputs = family.inputs(LONG)
    kept = oracle.kept_tokens(family, inputs, CONFIG)
    with vl_cache(family.model, CONFIG) as session:
        expected = family.model(**inputs, output_hidden_states=True)
        out = family.model.model(**inputs)
        assert session.cache is out[CACHE]
        assert_kept(out[CACHE], kept, inputs)
        torch.testing.assert_close(out.last_hidden_state, expected.hidden_states[-1])
        step = dict(input_ids=torch.tensor([[7]]))
        logits = family.model(**step, **{CACHE: expected[CACHE]}).logits
        hidden = family.model.model(**step, **{CACHE: out[CACHE]}).last_hidden_state
        torch.testing.assert_close(family.model.lm_head(hidden), logits)
        with pytest.raises(ValueError, match="expected a VLCache"):
            family.model.model(**inputs, **{CACHE: DynamicCache()})


@torch.no_grad()
def test_pixels_and_caches_by_position(family):
    inputs = family.inputs(LONG)
    kept = oracle.kept_tokens(family, inputs, CONFIG)
    pixels, mask = inputs["pixel_values"], inputs["attention_mask"]
    with vl_cache(family.model, CONFIG) as session:
        cache = session.new_cache()
        family.model(inputs["input_ids"], pixels, mask, None, cache)
        assert_kept(cache, kept, inputs)
        cached = family.model(torch.tensor([[7]]), None, None, None, cache)
        assert cached[CACHE] is cache
        with pytest.raises(ValueError, match="expected a VLCache"):
            family.model(inputs["input_ids"], pixels, mask, None, DynamicCache())


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_blip2(recwarn, cuda_graph):
    """`pixel_values` come first, and the generate that decodes is its language model's."""
    family = unusual_models.blip2()
    inputs = family.inputs(LONG)
    with vl_cache(family.model, CONFIG, cuda_graph=cuda_graph) as session:
        out = family.model.generate(**inputs, **GREEDY)
        cache = session.cache
        with pytest.raises(NotImplementedError, match=r"^session\.generate: got Blip2"):
            session.generate(**inputs, max_new_tokens=4, do_sample=False)
        rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
        again = family.model.generate(inputs["pixel_values"], **rest, **GREEDY)
        assert torch.equal(again.sequences, out.sequences) and session.report() is not None
        with torch.no_grad():
            forward = family.model(inputs["pixel_values"], inputs["input_ids"])
        assert session.cache.is_compressed
        torch.testing.assert_close(forward.logits[:, -1], out.logits[0], atol=1e-4, rtol=0)
        session.cache = cache
    assert_compressed_run(family, inputs, CONFIG, session, out)
    assert not [w for w in recwarn if "left whole" in str(w.message)]


def test_kosmos2():
    """Its processor marks where the image is; nothing else does. Its text hands a mask of its own
    to the attention, so that it is whole or refused, but never wrong."""
    family = unusual_models.kosmos2()
    inputs = family.inputs(LONG)
    marks = (inputs["input_ids"] == 100).long()
    assert torch.equal(
        visual.visual_tokens(
            family.model.config, inputs["input_ids"], dict(image_embeds_position_mask=marks)
        ),
        marks.bool(),
    )
    pixels = inputs.pop("pixel_values")
    arguments = dict(inputs, max_new_tokens=6, do_sample=False)
    expected = family.model.generate(pixels, marks, **arguments)
    with vl_cache(family.model, budget=1.0):
        assert torch.equal(family.model.generate(pixels, marks, **arguments), expected)
    refused = pytest.raises(NotImplementedError, match=r"^attention_mask: got")
    with vl_cache(family.model, CONFIG), refused:
        family.model.generate(pixels, marks, **arguments)


@torch.no_grad()
def test_a_model_that_does_not_tell_where_its_images_are():
    model = unusual_models.git()
    inputs = dict(input_ids=torch.tensor([[1, 5, 6, 7]]), pixel_values=torch.randn(1, 3, 56, 56))
    with vl_cache(model, CONFIG), pytest.raises(NotImplementedError, match=r"^pixel_values: got"):
        model(**inputs)


@torch.no_grad()
def test_an_image_without_a_token_is_said_to_be_whole(family):
    """Once; the model itself may have more to say of it."""
    inputs = family.inputs(LONG)
    text = dict(input_ids=torch.tensor([[1, 5, 6, 7]]))
    with vl_cache(family.model, CONFIG) as session, pytest.warns(UserWarning, match="left whole"):
        try:
            family.model(**text, pixel_values=inputs["pixel_values"])
        except ValueError as error:
            assert "features" in str(error) or "tokens" in str(error)
        assert session.report() is None
    with warnings.catch_warnings(), vl_cache(family.model, CONFIG):
        warnings.simplefilter("error")
        family.model(**text)
        family.model(**inputs)


@pytest.mark.parametrize("choices", [{}, dict(streaming=True), dict(cuda_graph=True)], ids=str)
@pytest.mark.parametrize("remainder", ["none", "mean"])
@pytest.mark.parametrize("family", ["llava", "mistral3", "llama4", "lfm2_vl"], indirect=True)
@torch.no_grad()
def test_a_text_prefix_first_and_the_image_behind_it(family, choices, remainder):
    """As one prompt: the same tokens are kept, also where the prefix has been packed whole."""
    whole = family.inputs([*PREFIX, *REST])
    part = {k: v for k, v in family.inputs(REST).items() if k != "attention_mask"}
    config = dataclasses.replace(CONFIG, remainder=remainder)
    kept = oracle.kept_tokens(family, whole, config)
    with vl_cache(family.model, config, **choices) as session:
        expected = family.model(**whole)
        cache = session.new_cache()
        family.model(input_ids=torch.tensor([PREFIX]), **{CACHE: cache})
        assert session.report() is None
        out = family.model(**part, attention_mask=whole["attention_mask"], **{CACHE: cache})
        assert_kept(cache, kept, whole)
        report, its = (x.to_dict() for x in (session.report(), expected[CACHE].report()))
        for name in ("lengths", "kept", "bytes_before", "bytes_after", "segments"):
            assert report[name] == its[name]
        torch.testing.assert_close(
            out.logits[:, -1], expected.logits[:, -1], atol=ORACLE_ATOL, rtol=0
        )
        step = dict(input_ids=torch.tensor([[7]]))
        out = family.model(**step, **{CACHE: cache}).logits
        expected = family.model(**step, **{CACHE: expected[CACHE]}).logits
        torch.testing.assert_close(out, expected, atol=ORACLE_ATOL, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"], indirect=True)
@pytest.mark.parametrize("cuda_graph", [False, True])
@torch.no_grad()
def test_such_a_prefix_where_two_passes_are_not_one(family, cuda_graph):
    """In these, plain Transformers reads an image behind a prefix in another way than with it."""
    part = {k: v for k, v in family.inputs(REST).items() if k != "attention_mask"}
    length = len(PREFIX) + part["input_ids"].shape[1]
    with vl_cache(family.model, CONFIG, cuda_graph=cuda_graph) as session:
        cache = session.new_cache()
        for inputs in (dict(input_ids=torch.tensor([PREFIX])), part):
            out = family.model(**inputs, **{CACHE: cache})
        assert out.logits.isfinite().all()
        assert session.report().lengths == [length]
        assert cache.plan.keep.sum() == round(CONFIG.budget * length * len(cache.plan.keep))
        assert cache.get_seq_length() == length


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
@torch.no_grad()
def test_a_prompt_begins_without_the_offsets_of_another(family):
    """The model keeps those of a batch of two; a text that is read next has none."""
    two = {k: torch.cat([v, v]) for k, v in family.inputs(LONG).items()}
    text, step = torch.tensor([PREFIX]), torch.tensor([[7]])
    expected = family.model(input_ids=torch.cat([text, step], 1)).logits[:, -1]
    with vl_cache(family.model, CONFIG, cuda_graph=False) as session:
        family.model(**two)
        cache = session.new_cache()
        family.model(input_ids=text, **{CACHE: cache})
        out = family.model(input_ids=step, **{CACHE: cache})
    torch.testing.assert_close(out.logits[:, -1], expected, atol=ORACLE_ATOL, rtol=0)


@pytest.mark.parametrize("cuda_graph", [False, True])
@torch.no_grad()
def test_a_model_that_leaves_tokens_out(family, cuda_graph):
    """As Nemotron Omni prunes videos: input_ids do not tell where the rest lies."""

    def leave_out(text_model, args, kwargs):
        for name in ("inputs_embeds", "attention_mask"):
            kwargs[name] = kwargs[name][:, 1:]
        return args, kwargs

    inputs = family.inputs(LONG)
    hook = family.model.model.language_model.register_forward_pre_hook(leave_out, with_kwargs=True)
    length = inputs["input_ids"].shape[1]
    match = rf"^model: got {length - 1} rows for a prompt of {length} tokens"
    try:
        refused = pytest.raises(NotImplementedError, match=match)
        with refused, vl_cache(family.model, CONFIG, cuda_graph=cuda_graph):
            family.model(**inputs)
        with vl_cache(family.model, budget=1.0, cuda_graph=False):  # nothing is compressed
            assert family.model(**inputs).logits.shape[1] == length - 1
    finally:
        hook.remove()


@pytest.mark.parametrize("cuda_graph", [False, True])
@torch.no_grad()
def test_a_later_image_without_a_token_is_said_to_be_whole(family, cuda_graph):
    """Once; the model itself may have more to say of it. (With tokens: test_image_turns.py)"""
    first, later = family.inputs(LONG), family.inputs(REST)
    text = dict(input_ids=torch.tensor([[5, 6, 7]]), pixel_values=later["pixel_values"])
    with vl_cache(family.model, CONFIG, cuda_graph=cuda_graph) as session:
        cache = session.new_cache()
        family.model(**first, **{CACHE: cache})
        with pytest.warns(UserWarning, match="left whole") as seen:
            for _ in range(2):
                with pytest.raises(ValueError, match=r"features|tokens"):
                    family.model(**text, **{CACHE: cache})
        assert len([w for w in seen if "left whole" in str(w.message)]) == 1
