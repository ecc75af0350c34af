"""After the block the model is as it was, and no other model ever notices."""

from __future__ import annotations

import pytest
import torch
from checks import GREEDY, STOCK_ATOL, assert_same_run, model_state
from families import LONG, SHORT, SUPPORTED, build

from vlcache_triton.integrations.transformers import vl_cache


class Broken(Exception):
    pass


class BreaksAfter:
    """A streamer that raises in the middle of generate."""

    def __init__(self, tokens):
        self.left = tokens

    def put(self, tokens):
        self.left -= 1
        if self.left == 0:
            raise Broken

    def end(self):
        pass


@pytest.mark.parametrize("family", SUPPORTED, indirect=True)
@pytest.mark.parametrize("budget", [0.4, 1.0])
def test_the_model_is_as_it_was(family, budget):
    inputs = family.inputs(LONG)
    before = model_state(family.model)
    expected = family.model.generate(**inputs, **GREEDY)
    with vl_cache(family.model, budget=budget):
        family.model.generate(**inputs, **GREEDY)
    assert model_state(family.model) == before
    assert_same_run(family.model.generate(**inputs, **GREEDY), expected, 0.0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"], indirect=True)
@pytest.mark.parametrize("tokens", [1, 2, 4])  # at the prompt, after the prefill, in decoding
def test_so_it_is_after_an_exception_in_generate(family, tokens):
    inputs = family.inputs(LONG)
    before = model_state(family.model)
    expected = family.model.generate(**inputs, **GREEDY)
    with pytest.raises(Broken), vl_cache(family.model, budget=0.4):
        family.model.generate(**inputs, **GREEDY, streamer=BreaksAfter(tokens))
    assert model_state(family.model) == before
    assert_same_run(family.model.generate(**inputs, **GREEDY), expected, 0.0)
    with vl_cache(family.model, budget=1.0):
        assert_same_run(family.model.generate(**inputs, **GREEDY), expected, STOCK_ATOL)


def test_so_it_is_after_an_exception_in_a_layer(family):
    """Half of the layers have been seen when the prefill breaks off."""
    inputs = family.inputs(LONG)
    before = model_state(family.model)
    expected = family.model.generate(**inputs, **GREEDY)

    def breaks(*args):
        raise Broken

    hook = family.model.model.language_model.layers[2].register_forward_pre_hook(breaks)
    try:
        with vl_cache(family.model, budget=0.4) as session:
            with pytest.raises(Broken):
                family.model.generate(**inputs, **GREEDY)
            hook.remove()
            after = family.model.generate(**inputs, **GREEDY)
            assert session.cache.is_compressed
    finally:
        hook.remove()
    assert model_state(family.model) == before
    assert_same_run(family.model.generate(**inputs, **GREEDY), expected, 0.0)
    with vl_cache(family.model, budget=0.4):
        assert_same_run(family.model.generate(**inputs, **GREEDY), after, 0.0)


def test_so_it_is_after_an_exception_in_the_block(family):
    before = model_state(family.model)
    with pytest.raises(Broken), vl_cache(family.model, budget=0.4):
        raise Broken
    assert model_state(family.model) == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_that_was_chosen_comes_back(implementation):
    model = build("llava").model
    model.set_attn_implementation(implementation)
    before = model_state(model)
    with vl_cache(model, budget=0.4):
        assert model_state(model)["attention"] != before["attention"]
        assert model.config.vision_config._attn_implementation == implementation
    assert model_state(model) == before


def test_a_block_can_be_entered_again(family):
    inputs = family.inputs(LONG)
    runs = []
    for _ in range(2):
        with vl_cache(family.model, budget=0.4):
            runs.append(family.model.generate(**inputs, **GREEDY))
    assert_same_run(runs[0], runs[1], 0.0)


def test_another_model_is_not_affected(family):
    other = build("llava")
    before = model_state(other.model)
    inputs = other.inputs(LONG, SHORT)
    expected = other.model.generate(**inputs, **GREEDY)
    with vl_cache(family.model, budget=0.2):
        family.model.generate(**inputs, **GREEDY)
        assert model_state(other.model) == before
        assert_same_run(other.model.generate(**inputs, **GREEDY), expected, 0.0)


def test_two_models_side_by_side(family):
    """Each has its own block, cache and budget; their steps may interleave."""
    other = build("qwen2_5_vl")
    prompts = [(family, family.inputs(LONG)), (other, other.inputs(LONG))]
    alone = []
    for (one, inputs), budget in zip(prompts, (0.2, 0.5), strict=True):
        with vl_cache(one.model, budget=budget):
            alone.append(one.model.generate(**inputs, **GREEDY))

    class Interleaved(BreaksAfter):
        """While the first model decodes, the second generates."""

        def put(self, tokens):
            inner = other.model.generate(**prompts[1][1], **GREEDY)
            assert_same_run(inner, alone[1], 0.0)

    with vl_cache(family.model, budget=0.2), vl_cache(other.model, budget=0.5):
        out = family.model.generate(**prompts[0][1], **GREEDY, streamer=Interleaved(0))
    assert_same_run(out, alone[0], 0.0)


def test_gradients_are_neither_kept_nor_needed(family):
    """A forward without no_grad works, and the cache holds no graph."""
    inputs = family.inputs(LONG)
    with vl_cache(family.model, budget=0.4) as session:
        cache = session.new_cache(max_new_tokens=4)
        with torch.enable_grad():
            family.model(**inputs, cache=cache)
        with torch.no_grad():
            token = torch.tensor([[7]])
            logits = family.model(input_ids=token, cache=cache).logits
    assert not logits.requires_grad and logits.isfinite().all()
