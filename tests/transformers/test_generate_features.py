"""What generate can do besides greedy search, with the full and with the compressed cache."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from checks import (
    GREEDY,
    ORACLE_ATOL,
    SAMPLE,
    STOCK_ATOL,
    assert_kept,
    assert_same_run,
    generate,
    logits,
)
from families import LONG, SHORT

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.names import CACHE

BEAMS = dict(GREEDY, num_beams=2, max_new_tokens=10)
BF16_ATOL = 0.02
FAMILIES = ["llava", "qwen2_5_vl", "gemma3", "qwen3_5"]
some_families = pytest.mark.parametrize("family", FAMILIES, indirect=True)


FEATURES = {
    "sampling": (SAMPLE, 1),
    "returned sequences": (dict(SAMPLE, num_return_sequences=2), 2),
    "beams": (BEAMS, 2),
    "returned beams": (dict(BEAMS, num_return_sequences=2), 2),
    "sampled beams": (dict(BEAMS, do_sample=True), 2),
    "penalties": (dict(GREEDY, repetition_penalty=1.5, no_repeat_ngram_size=2), 1),
}
each_feature = pytest.mark.parametrize(("arguments", "copies"), FEATURES.values(), ids=FEATURES)


@some_families
@each_feature
def test_a_full_budget_is_the_stock_model(family, arguments, copies):
    inputs = family.inputs(LONG, SHORT)
    expected = generate(family, inputs, arguments)
    with vl_cache(family.model, budget=1.0):
        out = generate(family, inputs, arguments)
    assert_same_run(out, expected, STOCK_ATOL)


@some_families
@each_feature
def test_a_compressed_run_equals_the_masked_full_cache(family, arguments, copies):
    inputs = family.inputs(LONG, SHORT)
    config = VLCacheConfig(budget=0.4)
    kept = oracle.kept_tokens(family, inputs, config)
    with oracle.evicted(family, kept, copies):
        expected = generate(family, inputs, arguments)
    with vl_cache(family.model, config) as session:
        out = generate(family, inputs, arguments)
    assert_kept(session.cache, kept, inputs, copies)
    assert_same_run(out, expected, ORACLE_ATOL)


def test_beams_do_change_places(family):
    """Without this, the beam tests would not show that the cache follows its beams."""
    out = generate(family, family.inputs(LONG, SHORT), BEAMS)
    moves = out.beam_indices[:, 1:].diff(dim=1)[(out.beam_indices[:, 2:] >= 0)]
    assert moves.ne(0).any()


def test_sampling_is_reproducible_and_depends_on_the_seed(family):
    inputs = family.inputs(LONG)
    with vl_cache(family.model, budget=0.4):
        runs = [generate(family, inputs, SAMPLE, seed).sequences for seed in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


class Listener:
    """A streamer that writes down what it is given."""

    def __init__(self):
        self.given, self.ends = [], 0

    def put(self, tokens):
        assert self.ends == 0
        self.given.append(tokens.flatten().tolist())

    def end(self):
        self.ends += 1


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
def test_a_streamer_gets_each_token_as_it_comes(family):
    inputs, listener = family.inputs(LONG), Listener()
    with vl_cache(family.model, budget=0.4):
        out = family.model.generate(**inputs, **GREEDY, streamer=listener)
    assert listener.given[0] == inputs["input_ids"][0].tolist()  # a streamer sees the prompt first
    new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert listener.given[1:] == [[token] for token in new]
    assert listener.ends == 1


def test_a_sequence_that_ends_early_is_padded(family):
    """One sequence of the batch stops at an end token while the other goes on."""
    inputs = family.inputs(LONG, SHORT)
    config = VLCacheConfig(budget=0.4)
    width = inputs["input_ids"].shape[1]
    with vl_cache(family.model, config):
        free = family.model.generate(**inputs, **GREEDY).sequences[:, width:]
        stop = next(int(t) for t in free[0] if t not in free[1])
        out = family.model.generate(**inputs, **GREEDY, eos_token_id=stop).sequences[:, width:]
    first = free[0].tolist().index(stop)
    assert torch.equal(out[1], free[1])
    assert out[0].tolist() == free[0, : first + 1].tolist() + [0] * (out.shape[1] - first - 1)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 80])
def test_any_number_of_new_tokens(family, max_new_tokens):
    inputs = family.inputs(SHORT)
    config = VLCacheConfig(budget=0.4)
    arguments = dict(GREEDY, max_new_tokens=max_new_tokens)
    kept = oracle.kept_tokens(family, inputs, config)
    with oracle.evicted(family, kept):
        expected = family.model.generate(**inputs, **arguments)
    with vl_cache(family.model, config) as session:
        out = family.model.generate(**inputs, **arguments)
    assert_same_run(out, expected, ORACLE_ATOL)
    # The last token generated is not in the cache.
    assert session.cache.get_seq_length() == out.sequences.shape[1] - 1


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("name", [None, "inputs"])
def test_token_ids_by_position_or_by_their_other_name(family, name):
    inputs = family.inputs(LONG)
    with vl_cache(family.model, budget=0.4) as session:
        expected = family.model.generate(**inputs, **GREEDY)
        ids = inputs.pop("input_ids")
        if name is None:
            out = family.model.generate(ids, **inputs, **GREEDY)
        else:
            out = family.model.generate(**{name: ids}, **inputs, **GREEDY)
        assert session.cache.is_compressed
    assert_same_run(out, expected, 0.0)


@pytest.mark.parametrize("family", ["llava", "gemma3"], indirect=True)
def test_guidance_reads_an_unconditional_prompt_beside_the_other(family):
    inputs = family.inputs(LONG, SHORT)
    config = VLCacheConfig(budget=0.4)
    arguments = dict(GREEDY, guidance_scale=1.5)
    with oracle.evicted(family, oracle.kept_tokens(family, inputs, config)):
        expected = family.model.generate(**inputs, **arguments)
    with vl_cache(family.model, config) as session:
        out = family.model.generate(**inputs, **arguments)
    assert_same_run(out, expected, ORACLE_ATOL)
    assert out[CACHE].is_compressed
    assert session.cache is out[CACHE]
    assert session.report().lengths == inputs["attention_mask"].sum(1).tolist()


@some_families
def test_half_precision(family):
    """Rounding may change what is kept, so what can be held to it is the budget and the answer."""
    model = copy.deepcopy(family.model).bfloat16()
    inputs = {
        k: v.bfloat16() if v.is_floating_point() else v
        for k, v in family.inputs(LONG, SHORT).items()
    }
    expected = model.generate(**inputs, **GREEDY)
    with vl_cache(model, budget=1.0):
        lossless = model.generate(**inputs, **GREEDY)
    assert_same_run(lossless, expected, BF16_ATOL)
    with vl_cache(model, budget=0.4) as session:
        out = model.generate(**inputs, **GREEDY)
    report = session.report()
    num_layers = len(report.layers)
    totals = [sum(layer[seq] for layer in report.kept) for seq in range(2)]
    assert totals == [round(0.4 * num_layers * length) for length in report.lengths]
    assert report.bytes_after == sum(totals) * 2 * 2 * 16 * 2  # K and V, two heads of 16 numbers
    prefill = logits(out)[:, 0], logits(expected)[:, 0]  # it sees everything
    torch.testing.assert_close(*prefill, atol=BF16_ATOL, rtol=0)
    assert logits(out).isfinite().all()
