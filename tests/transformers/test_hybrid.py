"""Models with linear, convolution or Mamba layers: states pass through, and are captured along.

Most of what these models have in common with all others is held to in the other files, of which
some take `qwen3_5` (linear layers) and `lfm3_vl` (convolutions, and windows besides).
"""

from __future__ import annotations

import pytest
import torch
from checks import GREEDY, ORACLE_ATOL, SAMPLE, assert_same_run, generate
from families import HYBRID, LONG, SHORT
from recorded_graph import RecordedGraph, recorded_graphs

from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.layers import StateLayer
from vlcache_triton.integrations.transformers.names import CACHE

every_hybrid = pytest.mark.parametrize("family", [*HYBRID, "qwen3_5"], indirect=True)
some_hybrids = pytest.mark.parametrize("family", ["qwen3_5", "lfm3_vl"], indirect=True)


def states_of(cache):
    return [x for layer in cache.layers if isinstance(layer, StateLayer) for x in layer.tensors()]


@every_hybrid
def test_a_replay_takes_the_states_along(family):
    """No Python of the model runs in it; the second prompt is lent the first one's memory."""
    prompts = [family.inputs(LONG, SHORT), family.inputs([*LONG[:-1], 30], SHORT, seed=1)]
    with vl_cache(family.model, budget=0.4, cuda_graph=False):
        expected = [generate(family, inputs, SAMPLE) for inputs in prompts]
    with vl_cache(family.model, budget=0.4, cuda_graph=True) as session, recorded_graphs(session):
        for inputs, run in zip(prompts, expected, strict=True):
            assert_same_run(generate(family, inputs, SAMPLE), run, ORACLE_ATOL)
        assert session.graphs.num_captures == 1
        assert RecordedGraph.num_replays == 6 + 7


@every_hybrid
def test_states_are_those_of_transformers_in_size_and_number(family):
    """Full-attention layers alone are compressed, and share the budget out."""
    inputs = family.inputs(LONG)
    stock = family.model.generate(**inputs, **GREEDY)[CACHE]
    expected = []
    for layer in stock.layers:
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            expected += [(x.shape, x.dtype) for x in states.values() if x is not None]
    assert expected
    with vl_cache(family.model, budget=0.4) as session:
        family.model.generate(**inputs, **GREEDY)
        assert [(x.shape, x.dtype) for x in states_of(session.cache)] == expected
    report, types = session.report(), family.text_config.layer_types
    assert report.layers == [i for i, kind in enumerate(types) if kind == "full_attention"]
    (length,) = report.lengths
    assert sum(kept for (kept,) in report.kept) == round(0.4 * length * len(report.layers))


@some_hybrids
def test_states_stay_where_captured_steps_find_them(family):
    """From one prompt to the next."""
    with vl_cache(family.model, budget=0.4, cuda_graph=True) as session:
        places = set()
        for seed in range(3):
            generate(family, family.inputs(LONG, SHORT, seed=seed), GREEDY)
            places.add(tuple(x.data_ptr() for x in states_of(session.cache)))
            assert [*map(id, states_of(session.cache))] == [
                *map(id, session.cache.packed.states.tensors)
            ]
            session.cache = None
        assert len(places) == 1 and session.graphs.num_captures == 1


@some_hybrids
def test_beams_leave_nothing_behind(family):
    """They move states at every step; between them, prompts replay captured steps as before."""
    inputs = family.inputs(LONG, SHORT)
    searches = GREEDY, dict(GREEDY, num_beams=2, max_new_tokens=10)
    with vl_cache(family.model, budget=0.4, cuda_graph=False):
        expected = [generate(family, inputs, arguments) for arguments in searches]
    with vl_cache(family.model, budget=0.4, cuda_graph=True) as session, recorded_graphs(session):
        for which in (0, 1, 0, 1, 1, 0):
            out = generate(family, inputs, searches[which])
            assert_same_run(out, expected[which], ORACLE_ATOL)
            session.cache = None
            del out
        assert RecordedGraph.num_replays > 3 * 5


@some_hybrids
def test_an_answer_that_ends_early_leaves_the_states_of_its_end(family):
    """No step has run ahead: none could be taken back."""
    inputs, arguments = family.inputs(LONG), dict(max_new_tokens=16, do_sample=False)
    width = inputs["input_ids"].shape[1]
    with vl_cache(family.model, budget=0.4) as session:
        new = family.model.generate(**inputs, **arguments)[0, width:].tolist()
        end = next(token for i, token in enumerate(new) if i > 4 and token not in new[:i])
        states = []
        for loop in (family.model.generate, session.generate):
            out = loop(**inputs, **arguments, eos_token_id=end)
            assert out.shape[1] < width + 16
            states.append([x.clone() for x in states_of(session.cache)])
    for tensor, expected in zip(*states, strict=True):
        torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=0)


@some_hybrids
def test_a_cache_that_is_reset_takes_a_batch_of_another_size(family):
    """Transformers' own layers would keep states of the first one's size."""
    prompts = family.inputs(LONG), family.inputs(LONG, SHORT, seed=1)
    with vl_cache(family.model, budget=0.4) as session:
        expected = [generate(family, inputs, GREEDY) for inputs in prompts]
        cache = session.new_cache(max_new_tokens=8)
        for inputs, run in zip(prompts, expected, strict=True):
            out = generate(family, inputs | {CACHE: cache}, GREEDY)
            assert_same_run(out, run, ORACLE_ATOL)
            cache.reset()
            assert states_of(cache) == []
