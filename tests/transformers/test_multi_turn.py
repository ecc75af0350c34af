"""Forward loops by hand and second turns: positions go on from the logical length."""

from __future__ import annotations

from contextlib import nullcontext

import oracle
import pytest
import torch
from checks import GREEDY, ORACLE_ATOL, STOCK_ATOL, assert_kept, assert_same_run
from families import LONG, SHORT, SUPPORTED
from torch.nn.functional import pad
from transformers import DynamicCache

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import VLCache, vl_cache
from vlcache_triton.integrations.transformers.names import CACHE

CONFIG = VLCacheConfig(budget=0.4)
SOME = ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"]
TURN = [30, 31, 32, 33, 34]
LONG_TURN = list(range(20, 61))  # more than 16 query rows on a compressed cache
VISION = ("pixel_values", "image_grid_thw", "image_sizes")


@torch.no_grad()
def by_hand(family, inputs, cache, turns=()):
    """Logits [num_seqs, n, vocabulary] of a prefill, greedy steps, and turns between them.

    Nothing but token ids and the cache is given after the prefill.
    """
    out = family.model(**inputs, **{CACHE: cache}, use_cache=True)
    logits = [out.logits[:, -1:]]
    for turn in ([], *turns):
        if turn:
            ids = torch.tensor([turn]).expand(len(inputs["input_ids"]), -1)
            out = family.model(input_ids=ids, **{CACHE: cache}, use_cache=True)
            logits.append(out.logits)
        for _ in range(4):
            token = out.logits[:, -1:].argmax(-1)
            out = family.model(input_ids=token, **{CACHE: cache}, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, 1)


def stock_by_hand(family, inputs, turns=(), config=CONFIG):
    kept = oracle.kept_tokens(family, inputs, config)
    with oracle.evicted(family, kept):
        cache = DynamicCache(config=family.model.config)
        return kept, by_hand(family, inputs, cache, turns)


@pytest.mark.parametrize("family", SUPPORTED, indirect=True)
def test_a_loop_by_hand_equals_the_masked_full_cache(family):
    inputs = family.inputs(LONG)
    kept, expected = stock_by_hand(family, inputs)
    with vl_cache(family.model, CONFIG) as session:
        cache = session.new_cache(max_new_tokens=64)
        out = by_hand(family, inputs, cache)
        assert session.report().kept == cache.plan.keep.tolist()
    assert_kept(cache, kept, inputs)
    torch.testing.assert_close(out, expected, atol=ORACLE_ATOL, rtol=0)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("family", SOME, indirect=True)
@pytest.mark.parametrize("prompts", [[LONG], [LONG, SHORT]], ids=["one", "padded"])
@pytest.mark.parametrize(
    "turns", [[TURN], [LONG_TURN], [TURN, LONG_TURN, TURN]], ids=["short", "long", "three"]
)
def test_turns_by_hand_equal_the_masked_full_cache(family, prompts, turns):
    inputs = family.inputs(*prompts)
    kept, expected = stock_by_hand(family, inputs, turns)
    with vl_cache(family.model, CONFIG) as session:
        cache = session.new_cache(max_new_tokens=128)
        out = by_hand(family, inputs, cache, turns)
    assert_kept(cache, kept, inputs)
    torch.testing.assert_close(out, expected, atol=ORACLE_ATOL, rtol=0)


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_a_full_budget_by_hand_is_the_stock_model(family):
    inputs = family.inputs(LONG)
    expected = by_hand(family, inputs, DynamicCache(config=family.model.config), [TURN])
    with vl_cache(family.model, budget=1.0) as session:
        out = by_hand(family, inputs, session.new_cache(max_new_tokens=4), [TURN])
    torch.testing.assert_close(out, expected, atol=STOCK_ATOL, rtol=0)


def test_a_cache_grows_past_the_tokens_it_was_made_for(family):
    inputs = family.inputs(LONG, SHORT)
    _, expected = stock_by_hand(family, inputs, [LONG_TURN, TURN])
    with vl_cache(family.model, CONFIG) as session:
        out = by_hand(family, inputs, session.new_cache(max_new_tokens=2), [LONG_TURN, TURN])
    torch.testing.assert_close(out, expected, atol=ORACLE_ATOL, rtol=0)


def test_a_cache_made_by_name(family):
    inputs = family.inputs(LONG)
    kept, expected = stock_by_hand(family, inputs)
    cache = VLCache(family.model.config, CONFIG, max_new_tokens=64)
    assert cache.plan is None and not cache.is_compressed and cache.get_seq_length() == 0
    with vl_cache(family.model, CONFIG):
        out = by_hand(family, inputs, cache)
    assert_kept(cache, kept, inputs)
    torch.testing.assert_close(out, expected, atol=ORACLE_ATOL, rtol=0)


def test_a_cache_made_by_name_serves_generate(family):
    inputs = family.inputs(LONG, SHORT)
    with vl_cache(family.model, CONFIG) as session:
        expected = family.model.generate(**inputs, **GREEDY)
        cache = VLCache(family.model.config, CONFIG, max_new_tokens=16)
        out = family.model.generate(**inputs, **GREEDY, **{CACHE: cache})
        assert session.cache is cache and session.report() == cache.report()
    assert out[CACHE] is cache and cache.is_compressed
    assert_same_run(out, expected, 0.0)


def test_a_forward_without_a_cache_brings_one(family):
    """As a stock model brings a DynamicCache along."""
    inputs = family.inputs(LONG)
    kept, expected = stock_by_hand(family, inputs)
    with vl_cache(family.model, CONFIG), torch.no_grad():
        out = family.model(**inputs)
        cache = out[CACHE]
        assert_kept(cache, kept, inputs)
        for step in range(4):
            torch.testing.assert_close(
                out.logits[:, -1], expected[:, step], atol=ORACLE_ATOL, rtol=0
            )
            token = out.logits[:, -1:].argmax(-1)
            out = family.model(input_ids=token, **{CACHE: cache})


def test_two_caches_of_one_model_interleave(family):
    """Each decode step belongs to the cache that it was given."""
    inputs = [family.inputs(LONG), family.inputs(SHORT, seed=1)]
    steps = [[7, 8, 9], [21, 22, 23]]
    ids = [[torch.tensor([[token]]) for token in row] for row in steps]

    @torch.no_grad()
    def decode(order):
        caches = [session.new_cache(max_new_tokens=8) for _ in inputs]
        logits = [[], []]
        for which, cache in enumerate(caches):
            family.model(**inputs[which], **{CACHE: cache})
        for which in order:
            step = ids[which][len(logits[which])]
            out = family.model(input_ids=step, **{CACHE: caches[which]})
            logits[which].append(out.logits)
        return [torch.cat(row, 1) for row in logits]

    with vl_cache(family.model, CONFIG) as session:
        one_after_the_other = decode([0, 0, 0, 1, 1, 1])
        interleaved = decode([0, 1, 1, 0, 1, 0])
    for a, b in zip(one_after_the_other, interleaved, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def two_turns(family, inputs, block, turn, new_tokens=GREEDY):
    """Generate, append the user's next turn to all that was said, generate on the same cache."""
    with block:
        first = family.model.generate(**inputs, **new_tokens)
        said = len(first.sequences)
        more = torch.cat([first.sequences, torch.tensor([turn]).expand(said, -1)], 1)
        new = more.shape[1] - inputs["input_ids"].shape[1]
        again = {k: v for k, v in inputs.items() if k not in VISION} | dict(input_ids=more)
        again["attention_mask"] = pad(inputs["attention_mask"], (0, new), value=1)
        for key in ("mm_token_type_ids", "token_type_ids"):
            if key in again:
                again[key] = pad(again[key], (0, new))
        second = family.model.generate(**again, **new_tokens, **{CACHE: first[CACHE]})
    return first, second


@pytest.mark.parametrize("family", [*SOME, "gemma3", "llama4"], indirect=True)
@pytest.mark.parametrize("prompts", [[LONG], [LONG, SHORT]], ids=["one", "padded"])
@pytest.mark.parametrize("turn", [TURN, LONG_TURN], ids=["short", "long"])
@pytest.mark.parametrize("budget", [1.0, 0.4])
def test_a_second_turn_of_generate(family, prompts, turn, budget):
    inputs = family.inputs(*prompts)
    config = VLCacheConfig(budget=budget)
    kept = oracle.kept_tokens(family, inputs, config)
    block = nullcontext() if config.is_lossless else oracle.evicted(family, kept)
    expected = two_turns(family, inputs, block, turn)
    out = two_turns(family, inputs, vl_cache(family.model, config), turn)
    atol = STOCK_ATOL if config.is_lossless else ORACLE_ATOL
    for run, stock in zip(out, expected, strict=True):
        assert_same_run(run, stock, atol)
