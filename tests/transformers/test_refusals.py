"""What cannot be compressed is refused by name, before any work, and the model stays as it was."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from checks import GREEDY, assert_same_run, nothing_computed
from families import LONG, SHORT, build
from transformers import DynamicCache

from vlcache_triton.integrations.transformers import VLCache, vl_cache
from vlcache_triton.integrations.transformers.names import CACHE
from vlcache_triton.recipe.policies import snapkv

REFUSED = (NotImplementedError, ValueError)
LEAN = dict(max_new_tokens=4, do_sample=False)

ARGUMENTS = {
    "assistant_model": dict(assistant_model=...),
    "prompt_lookup_num_tokens": dict(prompt_lookup_num_tokens=3),
    "prefill_chunk_size": dict(prefill_chunk_size=8),
    "use_cache": dict(use_cache=False),
    "output_attentions": dict(output_attentions=True),
    "cache_implementation": dict(cache_implementation="static"),
}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_generate(family, name):
    arguments = dict(ARGUMENTS[name])
    if name == "assistant_model":
        arguments[name] = build(family.name).model
    inputs = family.inputs(LONG)
    with nothing_computed(family.model), vl_cache(family.model, budget=0.4) as session:
        with pytest.raises(REFUSED, match=name):
            family.model.generate(**inputs, max_new_tokens=3, **arguments)
        assert session.report() is None


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
def test_a_bad_argument_does_not_spoil_the_next_call(family):
    inputs = family.inputs(LONG)
    with vl_cache(family.model, budget=0.4):
        expected = family.model.generate(**inputs, **GREEDY)
        with pytest.raises(REFUSED):
            family.model.generate(**inputs, **GREEDY, prefill_chunk_size=8)
        assert_same_run(family.model.generate(**inputs, **GREEDY), expected, 0.0)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_right_padding(family):
    inputs = family.inputs(LONG, SHORT)
    pads = int((inputs["attention_mask"][1] == 0).sum())
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in inputs:
            inputs[key][1] = inputs[key][1].roll(-pads)
    with nothing_computed(family.model), vl_cache(family.model, budget=0.4) as session:
        with pytest.raises(REFUSED, match="attention_mask"):
            family.model.generate(**inputs, **GREEDY)
        with pytest.raises(REFUSED, match="attention_mask"), torch.no_grad():
            family.model(**inputs, cache=session.new_cache(max_new_tokens=4))


def test_a_hole_in_the_attention_mask(family):
    inputs = family.inputs(LONG)
    inputs["attention_mask"][0, 4] = 0
    refused = pytest.raises(REFUSED, match="attention_mask")
    with nothing_computed(family.model), vl_cache(family.model, budget=0.4), refused:
        family.model.generate(**inputs, **GREEDY)


def test_embeddings_without_token_ids(family):
    """Where the image is cannot be seen in them."""
    embeddings = torch.randn(1, 6, 64)
    with nothing_computed(family.model), vl_cache(family.model, budget=0.4) as session:
        with pytest.raises(REFUSED, match="inputs_embeds"):
            family.model.generate(inputs_embeds=embeddings, max_new_tokens=2)
        cache = session.new_cache(max_new_tokens=4)
        with pytest.raises(REFUSED, match="inputs_embeds"), torch.no_grad():
            family.model(inputs_embeds=embeddings, cache=cache)


def test_continuous_batching(family):
    refused = pytest.raises(REFUSED, match="generate_batch")
    with nothing_computed(family.model), vl_cache(family.model, budget=0.4), refused:
        family.model.generate_batch([[1, 5, 6, 7], [1, 9, 10]], max_new_tokens=2)


def test_a_cache_of_another_kind(family):
    """It would not be compressed, and nobody would notice."""
    inputs = family.inputs(LONG)
    with vl_cache(family.model, budget=0.4):
        with pytest.raises(REFUSED, match=CACHE):
            family.model.generate(**inputs, **GREEDY, cache=DynamicCache())
        with pytest.raises(REFUSED, match=CACHE), torch.no_grad():
            family.model(**inputs, cache=DynamicCache())


def test_a_compressed_cache_outside_the_block(family):
    """The stock attention would see the new token alone."""
    with vl_cache(family.model, budget=0.4) as session:
        family.model.generate(**family.inputs(LONG), **GREEDY)
        cache = session.cache
    with pytest.raises((RuntimeError, *REFUSED), match="vl_cache"), torch.no_grad():
        family.model(input_ids=torch.tensor([[7]]), **{CACHE: cache})


def test_a_crop_of_a_compressed_cache(family):
    """What was evicted cannot be brought back."""
    with vl_cache(family.model, budget=0.4) as session:
        family.model.generate(**family.inputs(LONG), **GREEDY)
        with pytest.raises(REFUSED):
            session.cache.crop(10)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (dict(budget=0.0), "budget"),
        (dict(budget=1.5), "budget"),
        (dict(backend="cuda"), "backend"),
        (dict(granularity="head"), "granularity"),
        (dict(threshold="often"), "threshold"),
        (dict(config=0.1), "config: got 0.1, expected a VLCacheConfig"),
        (dict(config=0.0), "config: got 0.0"),
        (dict(config={"budget": 0.1}), "config: got {"),
        (dict(policy="snapkv"), "policy: got 'snapkv', expected a Policy"),
        (dict(policy=snapkv), "policy: got <function snapkv"),
        (dict(policy=None), "policy: got None"),
        (dict(policy=snapkv(), streaming=True), "streaming: got True with the policy 'snapkv'"),
    ],
)
def test_a_bad_configuration(family, arguments, name):
    refused = pytest.raises(REFUSED, match=f"^{re.escape(name)}")
    with nothing_computed(family.model), refused, vl_cache(family.model, **arguments):
        pytest.fail("the block was entered")


def test_a_share_without_its_name(family):
    with (
        pytest.raises(ValueError, match=r"^config: got 0.1, .*budget=0.1"),
        vl_cache(family.model, 0.1),
    ):
        pytest.fail("the block was entered")


@pytest.mark.parametrize("choices", [dict(config=0.1), dict(policy="snapkv")])
def test_a_cache_of_a_bad_configuration(family, choices):
    (name,) = choices
    with pytest.raises(ValueError, match=f"^{name}: got"):
        VLCache(family.model.config, **choices)


def test_a_session_after_its_block(family):
    """Its report stays, but the model no longer compresses."""
    inputs = family.inputs(LONG)
    with vl_cache(family.model, budget=0.4) as session:
        expected = session.generate(**inputs, **LEAN)
    with nothing_computed(family.model):
        for call in (lambda: session.generate(**inputs, **LEAN), session.new_cache):
            with pytest.raises(ValueError, match=r"^session\.\w+: got a call after its vl_cache"):
                call()
        with vl_cache(family.model, budget=0.2), pytest.raises(ValueError, match=r"^session\."):
            session.generate(**inputs, **LEAN)
    assert session.report().budget == 0.4
    with vl_cache(family.model, budget=0.4) as session:
        assert torch.equal(session.generate(**inputs, **LEAN), expected)


class Peft(torch.nn.Module):
    """As peft's: a wrapper, whose base model has the adapter in it."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def get_base_model(self):
        return self.inner


def compiled_in_place(model):
    model = copy.deepcopy(model)
    model.compile()
    return model


def compiled_forward(model):
    model = copy.deepcopy(model)
    model.forward = torch.compile(model.forward)
    return model


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (Peft, r"got Peft, expected its get_base_model\(\)"),
        (
            lambda model: torch.compile(copy.deepcopy(model)),
            "got OptimizedModule, expected .*_orig_mod",
        ),
        (compiled_in_place, "expected one that is not compiled"),
        (compiled_forward, "expected one that is not compiled"),
        (lambda model: copy.deepcopy(model).train(), r"expected .*model\.eval\(\)"),
        (lambda model: model.model, "expected one that can generate"),
    ],
)
def test_a_model_of_another_kind(family, wrap, expected):
    refused = pytest.raises(ValueError, match=f"^model: .*{expected}")
    with refused, vl_cache(wrap(family.model), budget=0.4):
        pytest.fail("the block was entered")


def test_training_inside_the_block(family):
    """Its passes were not compressed, and nobody was told."""
    inputs = family.inputs(LONG)
    with vl_cache(family.model, budget=0.4):
        family.model.train()
        try:
            with pytest.raises(ValueError, match=r"^model: .*model\.eval\(\)"), torch.no_grad():
                family.model(**inputs)
        finally:
            family.model.eval()
        assert family.model(**inputs)[CACHE].is_compressed


def test_a_copy_of_a_model_inside_its_block(family):
    """Its `generate` would be that of the original."""
    with vl_cache(family.model, budget=0.4):
        for model in (family.model, family.model.model):
            with pytest.raises(NotImplementedError, match=r"^copy\.deepcopy: got"):
                copy.deepcopy(model)
    copy.deepcopy(family.model)


def test_a_second_vl_cache_on_the_same_model(family):
    inputs = family.inputs(LONG)
    with vl_cache(family.model, budget=0.4) as session:
        out = family.model.generate(**inputs, **GREEDY)
        refused = pytest.raises((RuntimeError, *REFUSED), match="vl_cache")
        with refused, vl_cache(family.model, budget=0.2):
            pytest.fail("the block was entered")
        assert_same_run(family.model.generate(**inputs, **GREEDY), out, 0.0)  # the outer one stands
        assert session.report().budget == 0.4
