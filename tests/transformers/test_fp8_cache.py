"""fp8 K and V, against the stock model whose full cache is masked and rounded by the same rule.

A code that lies between two may round the other way, since K and V of two ways of attention differ
in their last bits. So what is held to is the noise of rounding itself: a tenth of it.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace

import oracle
import pytest
import torch
from checks import GREEDY, ORACLE_ATOL, assert_kept, nothing_computed
from families import LONG, SHORT, build
from recorded_graph import RecordedGraph, recorded_graphs
from test_copies import ask, block, dialogues, saved
from test_copies import read as read_prompt
from test_image_turns import CHOICES, passes, read, real_rows
from torch import Tensor

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import context, support, vl_cache
from vlcache_triton.integrations.transformers.names import CACHE
from vlcache_triton.ops import get_backend
from vlcache_triton.recipe.policies import full

FP8 = torch.float8_e4m3fn
FP8_CHOICES = {name: replace(x, kv_cache_dtype="fp8_e4m3") for name, x in CHOICES.items()}
CONFIG = FP8_CHOICES["row"]
NOISE = 0.1
each_choice = pytest.mark.parametrize("name", CHOICES)


def assert_near(out: Tensor, expected: Tensor, unrounded: Tensor) -> None:
    noise = (expected - unrounded).abs().max()
    assert noise > 20 * ORACLE_ATOL
    assert (out - expected).abs().max() < NOISE * noise


def ours(family, config, passes, way="eager", **choices):
    """Of each pass: its logits, and the rows of all heads; and the cache."""
    with ExitStack() as stack:
        session = stack.enter_context(
            vl_cache(family.model, config, cuda_graph=way != "eager", **choices)
        )
        if way == "recorded":
            stack.enter_context(recorded_graphs(session))
        cache, out = session.new_cache(max_new_tokens=4), []
        for inputs in passes:
            logits = read(family, cache, inputs)
            rows = None if cache.ragged is None else cache.ragged.seqused_k.long()
            out.append((logits[real_rows(inputs)], rows))
        assert way != "recorded" or RecordedGraph.num_replays > 0
        return out, cache


def stock(family, config, passes):
    dialogue = oracle.Dialogue(family, config)
    return [(dialogue.read(x)[real_rows(x)], dialogue.live_rows().flatten(1)) for x in passes]


def assert_same(family, name, passes, way="eager", **choices):
    """Logits and rows of every head, pass by pass."""
    out, cache = ours(family, FP8_CHOICES[name], passes, way, **choices)
    expected = stock(family, FP8_CHOICES[name], passes)
    for (_, rows), (_, expected_rows) in zip(out, expected, strict=True):
        assert rows is None or torch.equal(rows, expected_rows)
    logits, expected, unrounded = (
        torch.cat([logits for logits, _ in x])
        for x in (out, expected, stock(family, CHOICES[name], passes))
    )
    assert_near(logits, expected, unrounded)
    assert cache.ragged.k.dtype == cache.ragged.v.dtype == FP8
    return cache


@each_choice
def test_prompts_steps_and_turns_equal_the_rounded_full_cache(family, name):
    assert_same(family, name, passes(family, LONG))


@pytest.mark.parametrize("family", ["llava", "gemma3", "lfm2_vl"], indirect=True)
def test_captured_steps_read_the_scales_where_they_are(family):
    """Windows, which stay in the model's dtype, and states beside what is compressed."""
    cache = assert_same(family, "row, bound", passes(family, LONG), "recorded")
    if cache.packed.rings is not None:
        assert cache.packed.rings.k.dtype == torch.float32


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "internvl_gpt_oss"], indirect=True)
def test_prompts_of_unequal_length(family):
    """Of a text with sinks, too."""
    assert_same(family, "row, bound", passes(family, LONG, SHORT))


def test_streaming(family):
    assert_same(family, "row", passes(family, LONG), streaming=True)


def test_the_kernels_in_the_interpreter(monkeypatch):
    """Of a prompt, of a turn that evicts, and of steps. conftest.py has mended its rounding."""
    monkeypatch.setattr(context, "check_fp8", lambda *args: None)
    family = build("llava", num_hidden_layers=2)
    some = passes(family, SHORT)
    assert_same(family, "row, bound", [some[0], some[4], some[5]], backend="triton")


@pytest.mark.parametrize(
    "arguments",
    [dict(num_beams=3), dict(do_sample=True, temperature=1.3, num_return_sequences=2)],
    ids=["beams", "samples"],
)
def test_generate(family, arguments):
    """Beams repeat, drop and reorder the sequences that scales belong to."""
    inputs, arguments = family.inputs(LONG, SHORT), GREEDY | arguments
    copies = arguments.get("num_beams", arguments.get("num_return_sequences"))

    def run(context):
        torch.manual_seed(0)
        with context:
            out = family.model.generate(**inputs, **arguments)
        return out.sequences, torch.stack(out.logits, 1)

    kept = oracle.kept_tokens(family, inputs, CONFIG)
    sequences, logits = run(oracle.evicted(family, kept, copies))
    kept.rounded = None
    _, unrounded = run(oracle.evicted(family, kept, copies))
    with vl_cache(family.model, CONFIG) as session:
        out, out_logits = run(ExitStack())
        assert_kept(session.cache, kept, inputs, copies)
    assert torch.equal(out, sequences)
    assert_near(out_logits[:, :2], logits[:, :2], unrounded[:, :2])  # of the same tokens


def test_the_lean_loop_answers_alike(family):
    """It runs steps ahead, and takes rows back."""
    inputs, outs = family.inputs(LONG, SHORT), []
    for way in ("eager", "captured"):
        with block(family, way, config=CONFIG) as session:
            for generate in (family.model.generate, session.generate):
                outs.append(generate(**inputs, max_new_tokens=8, do_sample=False))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_each_sequence_takes_its_scales_along(family):
    """Also where it is repeated, and in another place."""
    prompts, order = family.inputs(LONG, SHORT), torch.tensor([1, 1, 0])
    tokens = torch.tensor([[7], [9]])
    with vl_cache(family.model, CONFIG) as session, torch.no_grad():
        cache = read_prompt(family, session, prompts)
        other = copy.deepcopy(cache)
        other.reorder_cache(order)
        expected = family.model(input_ids=tokens, **{CACHE: cache}).logits
        out = family.model(input_ids=tokens[order], **{CACHE: other}).logits
        assert not torch.equal(*cache.ragged.k_descale.unflatten(1, (2, -1)).unbind(1))
    torch.testing.assert_close(out, expected[order], atol=ORACLE_ATOL, rtol=0)


@pytest.mark.parametrize("way", ["eager", "captured", "recorded", "lean"])
def test_copies_and_files_answer_alike(family, way):
    inputs, question = family.inputs(LONG, SHORT), [30, 31, 32, 33, 34]
    choices = dict(budget=0.4, remainder="mean", kv_cache_dtype="fp8_e4m3")
    (expected,) = dialogues(family, inputs, way, [question], **choices)
    with block(family, way, **choices) as session, ExitStack() as stack:
        if way == "recorded":
            stack.enter_context(recorded_graphs(session))
        cache = read_prompt(family, session, inputs)
        copies = copy.deepcopy(cache), saved(cache), cache
        for other in copies:
            assert other.ragged.shape.is_fp8
            assert torch.equal(ask(family, session, inputs, other, question, way), expected)
        assert all(x.ragged.k.dtype == FP8 for x in copies)


@pytest.mark.parametrize("way", ["eager", "captured"])
def test_what_is_left_whole_stays_in_the_models_dtype(family, way):
    """A text is, packed or not, until an image behind it makes one prompt with it."""
    text, turn = {"input_ids": torch.tensor([[1, *range(30, 60)]])}, passes(family, LONG)[4:7]
    with vl_cache(family.model, CONFIG, cuda_graph=way != "eager") as session:
        cache = session.new_cache(max_new_tokens=8)
        with torch.no_grad():
            expected = family.model(**text).logits
        torch.testing.assert_close(read(family, cache, text), expected, atol=1e-5, rtol=0)
        assert session.report() is None
        if way == "captured":
            assert cache.ragged.k.dtype == cache.ragged.dtype == torch.float32
            assert cache.ragged.k_descale is None
    assert_same(family, "row", [text, *turn], way)


def test_a_report_counts_bytes_before_as_the_model_has_them(family):
    """fp32, and one byte after; of the prompt, and of a later turn."""
    text = family.text_config
    row = 2 * text.num_key_value_heads * family.text_config.hidden_size // text.num_attention_heads
    with vl_cache(family.model, CONFIG) as session:
        cache = session.new_cache(max_new_tokens=8)
        for inputs in passes(family, LONG)[:5]:
            read(family, cache, inputs)
            report = session.report()
            if "pixel_values" in inputs:
                num_seen = sum(report.lengths) * len(report.layers)
                assert report.bytes_before == num_seen * row * 4
                assert report.bytes_after == sum(map(sum, report.kept)) * row
                assert report.bytes_allocated == cache.ragged.k.nbytes + cache.ragged.v.nbytes
    assert report.segments == 2


def test_gpus_without_fp8_are_refused(family, monkeypatch):
    device, triton = torch.device("cuda"), get_backend("auto", torch.device("cpu"))
    triton = triton._replace(name="triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(NotImplementedError, match=r"^kv_cache_dtype: got 'fp8_e4m3' on a GPU of"):
        support.check_fp8(CONFIG, triton, device)
    support.check_fp8(CHOICES["row"], triton, device)
    support.check_fp8(CONFIG, triton._replace(name="reference"), device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    support.check_fp8(CONFIG, triton, device)


def test_the_interpreter_is_refused(family):
    message = r"^kv_cache_dtype: got 'fp8_e4m3' in Triton's interpreter, .*backend='reference'"
    with nothing_computed(family.model), pytest.raises(NotImplementedError, match=message):
        vl_cache(family.model, CONFIG, backend="triton").__enter__()


def test_a_whole_budget_is_refused(family):
    message = r"^kv_cache_dtype: got 'fp8_e4m3', expected 'auto' where budget=1\.0"
    with nothing_computed(family.model), pytest.raises(ValueError, match=message):
        vl_cache(family.model, budget=1.0, kv_cache_dtype="fp8_e4m3").__enter__()
    with nothing_computed(family.model), pytest.raises(ValueError, match=message):
        vl_cache(family.model, CONFIG, policy=full()).__enter__()
    assert VLCacheConfig(budget=1.0, max_cache_tokens=20, kv_cache_dtype="fp8_e4m3").is_fp8
