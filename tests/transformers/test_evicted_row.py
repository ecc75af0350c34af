"""A row for what is evicted, against the masked full cache that sees the mean of what it masks.

Its options and budgets are in test_recipe_options.py, with streaming in test_streaming_adapter.py.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import (
    GREEDY,
    ORACLE_ATOL,
    assert_compressed_run,
    assert_kept,
    assert_same_run,
)
from families import LONG, SHORT, SUPPORTED
from recorded_graph import RecordedGraph, recorded_graphs
from test_multi_turn import LONG_TURN, TURN, by_hand, stock_by_hand, two_turns

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import vl_cache

CONFIG = VLCacheConfig(budget=0.4, remainder="mean")
SOME = ["llava", "qwen2_5_vl", "gemma3"]


@pytest.mark.parametrize("family", SUPPORTED, indirect=True)
def test_every_family(family):
    """Unequal prompts in one batch, groups of heads, windows beside compressed layers."""
    inputs = family.inputs(LONG, SHORT)
    with vl_cache(family.model, CONFIG) as session:
        out = family.model.generate(**inputs, **GREEDY)
    assert_compressed_run(family, inputs, CONFIG, session, out)
    plan = session.cache.plan
    lengths = inputs["attention_mask"].sum(1)[None, :, None]
    assert torch.equal(plan.evicted + plan.head_tokens, lengths.expand_as(plan.evicted))


def test_it_is_not_the_answer_without_it(family):
    """Or all of this would show nothing."""
    inputs = family.inputs(LONG, SHORT)
    runs = []
    for remainder in ("mean", "none"):
        with vl_cache(family.model, budget=0.4, remainder=remainder):
            runs.append(family.model.generate(**inputs, **GREEDY))
    first, second = (out.logits[1] for out in runs)
    assert (first - second).abs().max() > 100 * ORACLE_ATOL


def test_the_kernels_in_the_interpreter(family):
    inputs = family.inputs(SHORT)
    with vl_cache(family.model, CONFIG, backend="triton") as session:
        out = family.model.generate(**inputs, **dict(GREEDY, max_new_tokens=2))
    assert_compressed_run(family, inputs, CONFIG, session, out)


@pytest.mark.parametrize("family", SOME, indirect=True)
@pytest.mark.parametrize("prompts", [[LONG], [LONG, SHORT]], ids=["one", "padded"])
def test_later_turns_see_it(family, prompts):
    """Of 16 rows and fewer, and of more, which take another way."""
    inputs = family.inputs(*prompts)
    turns = [TURN, LONG_TURN, TURN]
    kept, expected = stock_by_hand(family, inputs, turns, CONFIG)
    with vl_cache(family.model, CONFIG) as session:
        cache = session.new_cache(max_new_tokens=128)
        out = by_hand(family, inputs, cache, turns)
    assert_kept(cache, kept, inputs)
    torch.testing.assert_close(out, expected, atol=ORACLE_ATOL, rtol=0)


def test_it_stays_where_a_cache_grows(family):
    inputs = family.inputs(LONG, SHORT)
    _, expected = stock_by_hand(family, inputs, [LONG_TURN, TURN], CONFIG)
    with vl_cache(family.model, CONFIG) as session:
        out = by_hand(family, inputs, session.new_cache(max_new_tokens=2), [LONG_TURN, TURN])
    torch.testing.assert_close(out, expected, atol=ORACLE_ATOL, rtol=0)


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_a_second_turn_of_generate(family):
    inputs = family.inputs(LONG, SHORT)
    kept = oracle.kept_tokens(family, inputs, CONFIG)
    expected = two_turns(family, inputs, oracle.evicted(family, kept), TURN)
    out = two_turns(family, inputs, vl_cache(family.model, CONFIG), TURN)
    for run, stock in zip(out, expected, strict=True):
        assert_same_run(run, stock, ORACLE_ATOL)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(num_beams=3),
        dict(num_beams=2, num_return_sequences=2),
        dict(do_sample=True, temperature=1.3, num_return_sequences=2),
    ],
    ids=["beams", "several beams", "samples"],
)
def test_sequences_take_it_along(family, arguments):
    """Beams repeat, drop and reorder the sequences that it belongs to."""
    inputs = family.inputs(LONG, SHORT)
    kept = oracle.kept_tokens(family, inputs, CONFIG)
    arguments = GREEDY | arguments
    copies = arguments.get("num_beams", arguments.get("num_return_sequences", 1))
    torch.manual_seed(0)
    with oracle.evicted(family, kept, copies):
        expected = family.model.generate(**inputs, **arguments)
    torch.manual_seed(0)
    with vl_cache(family.model, CONFIG):
        out = family.model.generate(**inputs, **arguments)
    assert_same_run(out, expected, ORACLE_ATOL)


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_captured_steps_find_it_where_it_was(family):
    """Prompts of other lengths replay a step that was captured for the first."""
    batches = [family.inputs(*prompts) for prompts in ([LONG, SHORT], [SHORT, LONG], [LONG, LONG])]
    arguments = dict(GREEDY, max_new_tokens=6)
    outs = []
    with vl_cache(family.model, CONFIG, cuda_graph=True) as session, recorded_graphs(session):
        for inputs in batches:
            out = family.model.generate(**inputs, **arguments)
            outs.append((out.sequences, torch.stack(out.logits, 1)))
            del out  # and with it the cache, which is lent again
            lean = session.generate(**inputs, max_new_tokens=6, do_sample=False)
            assert torch.equal(lean, outs[-1][0])
        assert RecordedGraph.num_replays >= 12
        assert session.graphs.num_captures <= 2
    for inputs, (sequences, logits) in zip(batches, outs, strict=True):
        kept = oracle.kept_tokens(family, inputs, CONFIG)
        with oracle.evicted(family, kept):
            expected = family.model.generate(**inputs, **arguments)
        assert torch.equal(sequences, expected.sequences)
        torch.testing.assert_close(
            logits, torch.stack(expected.logits, 1), atol=ORACLE_ATOL, rtol=0
        )


def test_a_prompt_that_is_left_whole_has_none(family):
    """A text beside a picture in one batch, and a lossless budget."""
    text = [1, *range(30, 60)]
    inputs = family.inputs(LONG, text)
    with vl_cache(family.model, CONFIG) as session:
        out = family.model.generate(**inputs, **GREEDY)
    assert_compressed_run(family, inputs, CONFIG, session, out)
    assert not session.cache.plan.evicted[:, 1].any()
    assert not session.cache.ragged.first_key_bias[:, 2:].any()
    with vl_cache(family.model, budget=1.0, remainder="mean") as session:
        out = family.model.generate(**inputs, **GREEDY)
    assert session.report() is None
    assert_same_run(out, family.model.generate(**inputs, **GREEDY), 0.0)
