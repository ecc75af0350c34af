"""session.generate: model.generate's tokens from a lean loop, or a refusal before any work."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from checks import model_state, nothing_computed
from families import LONG, SHORT, SUPPORTED
from recorded_graph import RecordedGraph, recorded_graphs
from torch.nn.functional import pad
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from vlcache_triton.integrations.transformers import cache as cache_module
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.generate import LAG
from vlcache_triton.pool import ragged as ragged_module

GREEDY = dict(max_new_tokens=8, do_sample=False)
WARM = dict(max_new_tokens=8, do_sample=True, temperature=1.3, top_k=0)
WARPERS = {
    "greedy": GREEDY,
    "temperature": dict(WARM, temperature=0.7),
    "top_k": dict(WARM, top_k=5),
    "top_p": dict(WARM, top_p=0.8),
    "min_p": dict(WARM, min_p=0.02),
    "penalty": dict(GREEDY, repetition_penalty=1.7),
    "all": dict(WARM, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.3),
}
SOME = ["llava", "qwen2_5_vl", "gemma3"]
some_families = pytest.mark.parametrize("family", SOME, indirect=True)
each_way = pytest.mark.parametrize("way", ["eager", "captured", "recorded"])


def lean(family, inputs, arguments, way="eager", seed=0, warm=True, **choices):
    """Tokens of session.generate; recorded steps replay from the second prompt's first step on."""
    captures = way != "eager"
    choices = dict(budget=0.4, cuda_graph=captures) | choices
    with (
        vl_cache(family.model, **choices) as session,
        recorded_graphs(session) if way == "recorded" and captures else nullcontext(),
    ):
        if warm and captures:
            torch.manual_seed(seed + 1)
            session.generate(**inputs, **arguments)
        torch.manual_seed(seed)
        out = session.generate(**inputs, **arguments)
        if captures and arguments["max_new_tokens"] > 2:
            assert session.graphs.num_captures > 0
            assert way != "recorded" or RecordedGraph.num_replays > 0
    return out


def stock(family, inputs, arguments, seed=0, **choices):
    """Tokens of model.generate."""
    with vl_cache(family.model, **dict(budget=0.4) | choices):
        torch.manual_seed(seed)
        return family.model.generate(**inputs, **arguments)


@pytest.mark.parametrize("family", SUPPORTED, indirect=True)
@each_way
def test_tokens_are_those_of_model_generate(family, way):
    """Greedy and sampled, of a padded batch."""
    inputs = family.inputs(LONG, SHORT)
    for arguments in (GREEDY, WARPERS["all"]):
        assert torch.equal(lean(family, inputs, arguments, way), stock(family, inputs, arguments))


@some_families
@pytest.mark.parametrize("arguments", WARPERS.values(), ids=WARPERS)
def test_every_warper(family, arguments):
    inputs = family.inputs(LONG, SHORT)
    out = lean(family, inputs, arguments, "recorded")
    assert torch.equal(out, stock(family, inputs, arguments))


def test_warpers_do_change_tokens(family):
    """Without this, the test above would not show that they are obeyed."""
    inputs = family.inputs(LONG)
    outs = {name: lean(family, inputs, arguments) for name, arguments in WARPERS.items()}
    different = {tuple(out[0].tolist()) for out in outs.values()}
    assert len(different) >= len(WARPERS) - 1


@some_families
def test_the_whole_cache(family):
    inputs = family.inputs(LONG, SHORT)
    for way in ("eager", "recorded"):
        out = lean(family, inputs, GREEDY, way, budget=1.0)
        assert torch.equal(out, stock(family, inputs, GREEDY, budget=1.0))


@pytest.mark.parametrize("family", ["exaone4_5", "hyperclovax_vision_v2"], indirect=True)
def test_it_captures_the_steps_of_models_that_hand_on_no_positions(family):
    """In `model.generate`, they count the tokens in the cache: in Python, so eagerly."""
    inputs = family.inputs(LONG, SHORT)
    out = lean(family, inputs, GREEDY, "recorded")
    assert torch.equal(out, stock(family, inputs, GREEDY))


@pytest.mark.parametrize("family", ["llava", "gemma3"], indirect=True)
@each_way
@pytest.mark.parametrize("new", [1, 2, LAG, LAG + 1, LAG + 2, 20])
def test_any_number_of_new_tokens(family, way, new):
    inputs = family.inputs(SHORT)
    arguments = dict(GREEDY, max_new_tokens=new)
    out = lean(family, inputs, arguments, way)
    assert out.shape[1] == inputs["input_ids"].shape[1] + new
    assert torch.equal(out, stock(family, inputs, arguments))


@some_families
@pytest.mark.parametrize("way", ["eager", "recorded"])
def test_an_answer_that_outgrows_its_room(family, way, monkeypatch):
    inputs = family.inputs(LONG, SHORT)
    arguments = dict(GREEDY, max_new_tokens=24)
    expected = stock(family, inputs, arguments)
    monkeypatch.setattr(cache_module, "MAX_HEAD_ROOM", 2)
    monkeypatch.setattr(ragged_module, "GROWTH", 1)
    assert torch.equal(lean(family, inputs, arguments, way, warm=False), expected)


def ends(free, width):
    """End tokens for every case: in the middle for one, for both, at once, never."""
    first, second = free[:, width:].tolist()
    only_first = next(t for t in first[1:] if t not in second)
    late = next(t for t in reversed(second) if t not in first)
    unused = next(t for t in range(1, 90) if t not in first + second)
    return {
        "one": only_first,
        "all": [only_first, late],
        "at once": [first[0], second[0]],
        "first of one": first[0],
        "never": unused,
    }


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
@each_way
@pytest.mark.parametrize("case", ["one", "all", "at once", "first of one", "never"])
def test_end_of_sequence(family, way, case):
    inputs = family.inputs(LONG, SHORT)
    width = inputs["input_ids"].shape[1]
    arguments = dict(GREEDY, max_new_tokens=16)
    free = stock(family, inputs, arguments)
    arguments["eos_token_id"] = ends(free, width)[case]
    expected = stock(family, inputs, arguments)
    seen = []
    out = lean(family, inputs, dict(arguments, on_tokens=seen.append), way)
    assert torch.equal(out, expected)
    if case == "at once":
        assert out.shape[1] == width + 1
    # No token behind the end is told, however far ahead the steps had run.
    told = torch.stack(seen[-(out.shape[1] - width) :], 1)
    assert torch.equal(told, expected[:, width:])


def test_a_pad_token_of_ones_own(family):
    inputs = family.inputs(LONG, SHORT)
    width = inputs["input_ids"].shape[1]
    end = ends(stock(family, inputs, GREEDY), width)["one"]
    for pad_token_id in (0, 59):
        arguments = dict(GREEDY, eos_token_id=end, pad_token_id=pad_token_id)
        out = lean(family, inputs, arguments, "captured")
        assert torch.equal(out, stock(family, inputs, arguments))
        assert out[0, -1] == pad_token_id


@some_families
@each_way
def test_tokens_are_told_in_order(family, way):
    inputs = family.inputs(LONG, SHORT)
    seen = []

    def on_tokens(tokens):
        assert tokens.shape == (2,) and tokens.dtype == torch.int64
        assert tokens.device.type == "cpu"
        seen.append(tokens)

    out = lean(family, inputs, dict(GREEDY, on_tokens=on_tokens), way, warm=False)
    assert torch.equal(torch.stack(seen, 1), out[:, -8:])


def test_what_a_listener_raises_ends_the_call_and_spoils_nothing(family):
    inputs = family.inputs(LONG)
    expected = stock(family, inputs, GREEDY)

    def on_tokens(tokens):
        raise KeyError("enough")

    with vl_cache(family.model, budget=0.4, cuda_graph=True) as session:
        with pytest.raises(KeyError, match="enough"):
            session.generate(**inputs, **GREEDY, on_tokens=on_tokens)
        assert torch.equal(session.generate(**inputs, **GREEDY), expected)
        assert torch.equal(family.model.generate(**inputs, **GREEDY), expected)


@some_families
@each_way
def test_returned_sequences(family, way):
    inputs = family.inputs(LONG, SHORT)
    arguments = dict(WARM, num_return_sequences=2)
    out = lean(family, inputs, arguments, way)
    assert out.shape[0] == 4 and not torch.equal(out[0], out[1])
    assert torch.equal(out, stock(family, inputs, arguments))


def test_the_models_own_generation_config_is_obeyed(family):
    inputs = family.inputs(LONG)
    config = copy.deepcopy(family.model.generation_config)
    config.update(do_sample=True, temperature=2.0, top_k=7, max_new_tokens=6)
    with vl_cache(family.model, budget=0.4) as session:
        torch.manual_seed(0)
        out = session.generate(**inputs, generation_config=config)
        torch.manual_seed(0)
        expected = family.model.generate(**inputs, generation_config=config)
    assert torch.equal(out, expected) and out.shape[1] == inputs["input_ids"].shape[1] + 6


def test_settings_do_not_leak_from_call_to_call(family):
    """Each of them is part of what a captured step does."""
    inputs = family.inputs(LONG, SHORT)
    expected = {name: stock(family, inputs, arguments) for name, arguments in WARPERS.items()}
    end = ends(expected["greedy"], inputs["input_ids"].shape[1])["one"]
    calls = dict(WARPERS, end=dict(GREEDY, eos_token_id=end))
    expected["end"] = stock(family, inputs, calls["end"])
    with vl_cache(family.model, budget=0.4, cuda_graph=True) as session, recorded_graphs(session):
        for _ in range(2):
            for name, arguments in calls.items():
                torch.manual_seed(0)
                out = session.generate(**inputs, **arguments)
                assert torch.equal(out, expected[name]), name
        assert session.graphs.num_captures == len(calls)


def test_both_loops_take_turns(family):
    """They share the cache, each with a step of its own."""
    prompts = [family.inputs(LONG, SHORT), family.inputs(LONG, SHORT, seed=1)]
    expected = [stock(family, inputs, GREEDY) for inputs in prompts]
    with vl_cache(family.model, budget=0.4, cuda_graph=True) as session, recorded_graphs(session):
        for _ in range(2):
            for inputs, tokens in zip(prompts, expected, strict=True):
                assert torch.equal(session.generate(**inputs, **GREEDY), tokens)
                assert torch.equal(family.model.generate(**inputs, **GREEDY), tokens)
        assert session.graphs.num_captures == 2
        assert session.report().budget == 0.4


@pytest.mark.parametrize("family", [*SOME, "qwen3_5"], indirect=True)
@pytest.mark.parametrize("loop", ["lean", "stock"])
@pytest.mark.parametrize("early", [False, True], ids=["to the end", "stopped early"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_second_turn_on_the_same_cache(family, loop, early, cuda_graph):
    """Steps that had run ahead of an end token have left nothing behind."""
    inputs = family.inputs(LONG)
    width = inputs["input_ids"].shape[1]
    arguments = dict(GREEDY, max_new_tokens=16)
    if early:
        new = stock(family, inputs, arguments)[0, width:].tolist()
        arguments["eos_token_id"] = next(t for i, t in enumerate(new) if i > 4 and t not in new[:i])

    def converse(answer, session):
        cache = session.new_cache(max_new_tokens=64)
        first = answer[0](**inputs, **arguments, cache=cache)
        ids = torch.cat([first, torch.tensor([[30, 31, 32]])], 1)
        new = ids.shape[1] - width
        again = {k: pad(inputs[k], (0, new)) for k in inputs if k.endswith("type_ids")}
        again |= dict(
            input_ids=ids, attention_mask=pad(inputs["attention_mask"], (0, new), value=1)
        )
        return first, answer[1](**again, **GREEDY, cache=cache), cache.get_seq_length()

    with vl_cache(family.model, budget=0.4, cuda_graph=cuda_graph) as session:
        model_generate = family.model.generate
        expected = converse([model_generate] * 2, session)
        second = session.generate if loop == "lean" else model_generate
        out = converse([session.generate, second], session)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])
    assert out[2] == expected[2]


class Unasked(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


REFUSED = {
    "streamer": dict(streamer=object()),
    "num_beams": dict(num_beams=2),
    "Never": dict(stopping_criteria=StoppingCriteriaList([Never()])),
    "MaxTime|max_time": dict(max_time=100.0),
    "Unasked": dict(logits_processor=LogitsProcessorList([Unasked()])),
    "NoRepeatNGram|no_repeat_ngram_size": dict(no_repeat_ngram_size=2),
    "SuppressTokens|suppress_tokens": dict(suppress_tokens=[4]),
    "output_scores": dict(output_scores=True, return_dict_in_generate=True),
    "return_dict_in_generate": dict(return_dict_in_generate=True),
    "custom_generate": dict(custom_generate=lambda *args, **kwargs: None),
}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_lean_loop_does_not_do_is_refused(family, name):
    with vl_cache(family.model, budget=0.4) as session:
        inputs = family.inputs(LONG)
        with nothing_computed(family.model), pytest.raises(NotImplementedError, match=name):
            session.generate(**inputs, **GREEDY, **REFUSED[name])
        assert torch.equal(session.generate(**inputs, **GREEDY), stock_inside(family, inputs))


def stock_inside(family, inputs):
    return family.model.generate(**inputs, **GREEDY)


@pytest.mark.parametrize("choices", [dict(num_beams=2), dict(no_repeat_ngram_size=2)], ids=str)
@pytest.mark.parametrize("of", ["argument", "model"])
def test_so_is_what_a_generation_config_asks_for(family, choices, of, monkeypatch):
    inputs = family.inputs(LONG)
    config = copy.deepcopy(family.model.generation_config)
    config.update(**choices)
    arguments = dict(GREEDY)
    if of == "model":
        monkeypatch.setattr(family.model, "generation_config", config)
    else:
        arguments["generation_config"] = config
    with vl_cache(family.model, budget=0.4) as session:
        with nothing_computed(family.model), pytest.raises(NotImplementedError):
            session.generate(**inputs, **arguments)
        assert session.report() is None


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_session_is_as_before_afterwards(family, cuda_graph):
    inputs = family.inputs(LONG)
    with vl_cache(family.model, budget=1.0, cuda_graph=cuda_graph) as session:
        before = model_state(family.model)
        session.generate(**inputs, **GREEDY)
        assert model_state(family.model) == before
        family.model.generate(**inputs, **GREEDY)
        # At budget 1.0 the stock loop packs the cache for captured steps alone.
        assert (session.cache.ragged is not None) == cuda_graph
