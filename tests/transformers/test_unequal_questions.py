"""Questions of unequal length in one batch, padded on the left behind one image that all share."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import ORACLE_ATOL
from families import LONG, SHORT
from recorded_graph import RecordedGraph
from test_copies import CHOICES, QUESTIONS, block, dialogues, each_way, graphs_of, read, saved

from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.names import CACHE

MORE = [61, 62, 63], list(range(64, 74)), [80]


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def ask(family, session, inputs, cache, questions, way, new=8):
    """All answers at once, behind what has been read: `inputs` are its ids and mask."""
    ids, mask = padded(questions)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], 1)
    length = inputs["input_ids"].shape[1]
    arguments = dict(inputs)
    if family.name == "qwen2_5_vl":
        arguments["mm_token_type_ids"] = (arguments["input_ids"] == 100).int()
    generate = session.generate if way in ("lean", "recorded") else family.model.generate
    out = generate(**arguments, **{CACHE: cache}, max_new_tokens=new, do_sample=False)
    inputs["input_ids"] = out
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(len(out), new)], 1)
    return out[:, length:]


def shared(family, session, prompt, copies, make=copy.deepcopy):
    """A cache of one prompt, copied and repeated; ids and mask of what is in it."""
    cache = make(read(family, session, prompt))
    cache.batch_repeat_interleave(copies)
    names = ("input_ids", "attention_mask")
    return cache, {name: prompt[name].repeat_interleave(copies, 0) for name in names}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@each_way
def test_each_is_answered_as_alone(family, choices, way):
    assert_as_alone(family, choices, way)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"], indirect=True)
@pytest.mark.parametrize("way", ["eager", "recorded"])
def test_positions_and_windows_know_no_pads(family, way):
    """(Where all is dense, Transformers' own windows have them.)"""
    assert_as_alone(family, CHOICES["remainder"], way)


def assert_as_alone(family, choices, way):
    prompt = family.inputs(LONG)
    expected = dialogues(family, prompt, way, **choices)
    with block(family, way, **choices) as session, graphs_of(session, way):
        cache, inputs = shared(family, session, prompt, len(QUESTIONS))
        out = ask(family, session, inputs, cache, QUESTIONS, way)
        assert torch.equal(out, torch.cat(expected))
        assert way != "recorded" or RecordedGraph.num_replays > 0


@pytest.mark.parametrize("family", ["llava", "gemma3", "llama4"], indirect=True)
@pytest.mark.parametrize("way", ["eager", "lean"])
def test_dialogues_go_on_side_by_side(family, way):
    """A second question each, behind answers; on a copy as well, and from a file."""
    prompt = family.inputs(SHORT)
    with block(family, way, budget=0.4, remainder="mean") as session:
        alone = []
        for first, second in zip(QUESTIONS, MORE, strict=True):
            cache, inputs = shared(family, session, prompt, 1)
            ask(family, session, inputs, cache, [first], way)
            alone.append(ask(family, session, inputs, cache, [second], way))
        if family.name == "llama4":  # whose scale counts pads, in plain Transformers too
            alone = None
        cache, inputs = shared(family, session, prompt, len(QUESTIONS), saved)
        ask(family, session, inputs, cache, QUESTIONS, way)
        for make in (copy.deepcopy, saved):
            out = ask(family, session, dict(inputs), make(cache), MORE, way)
            if alone is not None:
                assert torch.equal(out, torch.cat(alone))
        order = torch.tensor([2, 0, 0])
        some = copy.deepcopy(cache)
        some.batch_select_indices(order)
        inputs = {name: x[order] for name, x in inputs.items()}
        again = ask(family, session, inputs, some, [MORE[2], MORE[0], MORE[0]], way)
        assert torch.equal(again, out[order])


@torch.no_grad()
def test_by_hand_with_positions(family):
    """Logits of every real row; a later pass without a mask sees what the last one saw."""
    prompt = family.inputs(LONG)
    ids, mask = padded(QUESTIONS)
    with vl_cache(family.model, budget=0.4) as session:
        cache, inputs = shared(family, session, prompt, len(QUESTIONS))
        mask = torch.cat([inputs["attention_mask"], mask], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        turn = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
        out = family.model(**turn, **{CACHE: cache}).logits
        step = torch.tensor([[7]] * 3)
        then = family.model(
            input_ids=step, position_ids=positions[:, -1:] + 1, **{CACHE: cache}
        ).logits
        for i, question in enumerate(QUESTIONS):
            own = read(family, session, prompt)
            logits = family.model(input_ids=torch.tensor([question]), **{CACHE: own}).logits[0]
            torch.testing.assert_close(out[i, -len(question) :], logits, atol=ORACLE_ATOL, rtol=0)
            logits = family.model(input_ids=step[:1], **{CACHE: own}).logits[0]
            torch.testing.assert_close(then[i], logits, atol=ORACLE_ATOL, rtol=0)


@torch.no_grad()
def test_masks_of_later_passes_have_the_pads_of_earlier_ones(family):
    prompt = family.inputs(LONG)
    ids, mask = padded(QUESTIONS)
    with vl_cache(family.model, budget=0.4) as session:
        cache, inputs = shared(family, session, prompt, len(QUESTIONS))
        mask = torch.cat([inputs["attention_mask"], mask], 1)
        family.model(input_ids=ids, attention_mask=mask, **{CACHE: cache})
        step = dict(input_ids=torch.tensor([[7]] * 3), **{CACHE: cache})
        mask = torch.cat([mask, torch.ones(3, 1)], 1)
        for wrong in (torch.ones_like(mask), mask.flip(0)):
            with pytest.raises(ValueError, match=r"^attention_mask: got .* zeros on tokens seen"):
                family.model(**step, attention_mask=wrong)
        nothing = mask.clone()
        nothing[1, -1] = 0
        with pytest.raises(
            ValueError, match=r"^attention_mask: got a zero on the last row .* \[1\]"
        ):
            family.model(**step, attention_mask=nothing)
        family.model(**step, attention_mask=mask)
