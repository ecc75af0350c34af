"""Captured decode steps: the eager path's tokens, one capture for many prompts, nothing kept alive.

On the CPU a capture is the call itself; `recorded_graph` stands in for a real one where it matters
that no Python runs in a replay.
"""

from __future__ import annotations

import gc
import inspect
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from checks import GREEDY, ORACLE_ATOL, SAMPLE, assert_same_run, generate, logits
from families import LONG, MROPE, SHORT, SUPPORTED
from recorded_graph import RecordedGraph, recorded_graphs
from torch.nn.functional import pad
from transformers import StoppingCriteria, StoppingCriteriaList

from vlcache_triton.integrations.transformers import VLCache, vl_cache
from vlcache_triton.integrations.transformers import cache as cache_module
from vlcache_triton.integrations.transformers.names import CACHE
from vlcache_triton.pool import ragged as ragged_module
from vlcache_triton.pool.allocator import MAX_POOLS, round_up

SOME = ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "lfm3_vl"]
every_family = pytest.mark.parametrize("family", SUPPORTED, indirect=True)
some_families = pytest.mark.parametrize("family", SOME, indirect=True)
each_budget = pytest.mark.parametrize("budget", [1.0, 0.4])
each_search = pytest.mark.parametrize("arguments", [GREEDY, SAMPLE], ids=["greedy", "sampled"])


@contextmanager
def session_of(family, cuda_graph=True, **choices):
    """A block that does not warn: every family can be captured."""
    choices = dict(budget=0.4) | choices
    with quiet(), vl_cache(family.model, cuda_graph=cuda_graph, **choices) as session:
        yield session


@contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cuda_graph")
        yield


def eagerly(family, inputs, arguments, **choices):
    with session_of(family, cuda_graph=False, **choices) as session:
        out = generate(family, inputs, arguments)
        assert session.graphs.num_captures == 0
    return out


@every_family
@each_budget
@each_search
def test_tokens_are_those_of_the_eager_path(family, budget, arguments):
    inputs = family.inputs(LONG, SHORT)
    expected = eagerly(family, inputs, arguments, budget=budget)
    with session_of(family, budget=budget) as session:
        out = generate(family, inputs, arguments)
        assert session.graphs.num_captures == 1
    assert_same_run(out, expected, ORACLE_ATOL)
    assert type(out) is type(expected)


@every_family
@each_budget
def test_a_replay_needs_no_python_of_the_model(family, budget):
    """With sampling, and a second prompt in the first one's bucket that replays alone."""
    prompts = [family.inputs(LONG, SHORT), family.inputs([*LONG[:-1], 30], SHORT, seed=1)]
    expected = [eagerly(family, inputs, SAMPLE, budget=budget) for inputs in prompts]
    with session_of(family, budget=budget) as session, recorded_graphs(session):
        for inputs, run in zip(prompts, expected, strict=True):
            assert_same_run(generate(family, inputs, SAMPLE), run, ORACLE_ATOL)
        assert session.graphs.num_captures == 1
        # Of each answer's seven steps; the very first step is eager.
        assert RecordedGraph.num_replays == 6 + 7


@some_families
def test_without_being_asked_for_nothing_is_captured_on_the_cpu(family):
    inputs = family.inputs(LONG)
    with vl_cache(family.model, budget=0.4) as session:
        generate(family, inputs, GREEDY)
        assert session.graphs.num_captures == 0 and not session.graphs.can_capture


def test_a_capture_serves_all_prompts_of_a_bucket(family):
    """As many tokens, one more, another batch, and back again."""
    length = len(family.image) + len(LONG) - 1
    assert round_up(length) == round_up(length + 1)
    with session_of(family) as session:
        captures = []
        for prompts in ([LONG], [LONG], [[*LONG, 30]], [LONG, SHORT], [LONG], [SHORT, LONG]):
            generate(family, family.inputs(*prompts), GREEDY)
            captures.append(session.graphs.num_captures)
    assert captures == [1, 1, 1, 2, 2, 2]


def test_another_bucket_is_captured_anew(family):
    far_longer = [*LONG, *range(20, 90)]
    runs, captures = [], []
    prompts = [family.inputs(p) for p in (LONG, far_longer, LONG, far_longer)]
    with session_of(family) as session:
        for inputs in prompts:
            out = generate(family, inputs, GREEDY)
            runs.append(SimpleNamespace(sequences=out.sequences, logits=out.logits))
            captures.append(session.graphs.num_captures)
            del out  # and with it the cache
    assert captures == [1, 2, 2, 2]
    for inputs, out in zip(prompts, runs, strict=True):
        assert_same_run(out, eagerly(family, inputs, GREEDY), ORACLE_ATOL)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000, 1024, 1025, 5000, 2**20 + 1, 10**8])
def test_buckets_hold_what_is_asked_and_little_more(rows):
    size = round_up(rows)
    assert rows <= size <= max(rows + 63, rows * 9 // 8)
    assert round_up(size) == size


def test_caches_kept_for_later_prompts_are_few(family):
    with session_of(family) as session:
        kept = []
        for batch in range(1, MAX_POOLS + 4):
            generate(family, family.inputs(*[SHORT] * batch), GREEDY)
            kept.append(weakref.ref(session.cache.ragged))
        session.cache = None
        gc.collect()
        assert sum(ragged() is not None for ragged in kept) <= MAX_POOLS
        assert kept[0]() is None and kept[-1]() is not None


class Listener:
    """A streamer that writes down what it is given."""

    def __init__(self):
        self.given = []

    def put(self, tokens):
        self.given.append(tokens.flatten().tolist())

    def end(self):
        self.given.append("end")


class StopBehind(StoppingCriteria):
    """Stops a sequence once it has a certain token."""

    def __init__(self, token, width):
        self.token, self.width = token, width

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, self.width :] == self.token).any(1)


@every_family
@pytest.mark.parametrize("recorded", [False, True])
def test_a_streamer_and_stopping_criteria(family, recorded):
    inputs, listener = family.inputs(LONG), Listener()
    width = inputs["input_ids"].shape[1]
    free = eagerly(family, inputs, GREEDY).sequences[0].tolist()
    new = free[width:]
    stop = StopBehind(new[4], width)
    end = new.index(new[4]) + 1
    with session_of(family) as session, recorded_graphs(session) if recorded else nullcontext():
        out = family.model.generate(
            **inputs, **GREEDY, streamer=listener, stopping_criteria=StoppingCriteriaList([stop])
        )
    assert out.sequences[0].tolist() == free[: width + end]
    assert listener.given == [free[:width], *[[token] for token in new[:end]], "end"]


def dialogue(family, inputs, *turns, cache=None):
    """Answers to a prompt and to turns that follow on the same cache."""
    outs = [family.model.generate(**inputs, **GREEDY, **{CACHE: cache})]
    extra = {k: v for k, v in inputs.items() if k in ("mm_token_type_ids", "token_type_ids")}
    for turn in turns:
        said = outs[-1].sequences
        ids = torch.cat([said, torch.tensor([turn]).expand(len(said), -1)], 1)
        new = ids.shape[1] - inputs["input_ids"].shape[1]
        again = {k: pad(v, (0, new)) for k, v in extra.items()}
        mask = pad(inputs["attention_mask"], (0, new), value=1)
        outs.append(
            family.model.generate(
                input_ids=ids,
                attention_mask=mask,
                **again,
                **GREEDY,
                **{CACHE: outs[-1][CACHE]},
            )
        )
    return outs


@pytest.mark.parametrize(
    ("family", "budget"),
    [(name, 0.4) for name in SUPPORTED] + [(name, 1.0) for name in SOME],
    indirect=["family"],
)
def test_a_dialogue(family, budget):
    inputs = family.inputs(LONG, SHORT)
    turns = [[30, 31, 32, 33], list(range(20, 45))]
    with session_of(family, cuda_graph=False, budget=budget):
        expected = dialogue(family, inputs, *turns)
    with session_of(family, budget=budget) as session, recorded_graphs(session):
        out = dialogue(family, inputs, *turns)
        assert RecordedGraph.num_replays > 6 + 5
    for run, stock in zip(out, expected, strict=True):
        assert_same_run(run, stock, ORACLE_ATOL)


@some_families
@each_budget
@pytest.mark.parametrize("by", ["new_cache", "head room"])
def test_an_answer_that_outgrows_its_room(family, budget, by, monkeypatch):
    """Growth between two steps moves the pools, and the step is captured again."""
    inputs = family.inputs(LONG, SHORT)
    arguments = dict(GREEDY, max_new_tokens=24)
    expected = eagerly(family, inputs, arguments, budget=budget)
    monkeypatch.setattr(ragged_module, "GROWTH", 1)
    if by == "head room":
        monkeypatch.setattr(cache_module, "MAX_HEAD_ROOM", 2)
    with session_of(family, budget=budget) as session, recorded_graphs(session):
        cache = session.new_cache(max_new_tokens=2) if by == "new_cache" else None
        out = family.model.generate(**inputs, **arguments, **{CACHE: cache})
        assert session.graphs.num_captures >= 2
        assert RecordedGraph.num_replays > 0
    assert_same_run(out, expected, ORACLE_ATOL)


@torch.no_grad()
def alternate(family, session, prompts, order, position_ids=True):
    """Greedy steps by hand of several dialogues, each on a cache of its own."""
    caches, outs, steps = [], [], [0] * len(prompts)
    for inputs in prompts:
        caches.append(session.new_cache(max_new_tokens=16))
        outs.append([family.model(**inputs, **{CACHE: caches[-1]}).logits[:, -1:]])
    for which in order:
        token = outs[which][-1].argmax(-1)
        steps[which] += 1
        mask, more = prompts[which]["attention_mask"], {}
        if position_ids:  # without them, Qwen's models in 5.17 take no mask either
            more["attention_mask"] = pad(mask, (0, steps[which]), value=1)
            position = mask.sum(1, keepdim=True) + steps[which] - 1
            more["position_ids"] = position.expand(3, -1, -1) if family.name in MROPE else position
        out = family.model(input_ids=token, **{CACHE: caches[which]}, **more)
        assert out[CACHE] is caches[which] and out.logits.shape[1] == 1
        outs[which].append(out.logits)
    return [torch.cat(rows, 1) for rows in outs]


@some_families
@each_budget
@pytest.mark.parametrize("recorded", [False, True])
def test_two_dialogues_alternate(family, budget, recorded):
    """Of one bucket, so that neither may be given the other's cache."""
    prompts = [family.inputs(LONG, SHORT), family.inputs(LONG, SHORT, seed=1)]
    order = [0, 1, 1, 0, 1, 0, 0, 0, 1, 1]
    with session_of(family, cuda_graph=False, budget=budget) as session:
        expected = alternate(family, session, prompts, order)
    assert not torch.equal(*expected)
    with session_of(family, budget=budget) as session:
        with recorded_graphs(session) if recorded else nullcontext():
            out = alternate(family, session, prompts, order)
        assert session.graphs.num_captures == 2
    for run, stock in zip(out, expected, strict=True):
        torch.testing.assert_close(run, stock, atol=ORACLE_ATOL, rtol=0)


@every_family
@pytest.mark.parametrize("position_ids", [True, False])
def test_a_loop_by_hand(family, position_ids):
    """Without positions the model works them out from the cache: in Python, so eagerly."""
    prompts = [family.inputs(LONG)]
    arguments = (prompts, [0] * 6, position_ids)
    with session_of(family, cuda_graph=False) as session:
        (expected,) = alternate(family, session, *arguments)
    with session_of(family) as session:
        (out,) = alternate(family, session, *arguments)
        assert session.graphs.num_captures == position_ids
        assert session.cache.get_seq_length() == prompts[0]["input_ids"].shape[1] + 6
    torch.testing.assert_close(out, expected, atol=ORACLE_ATOL, rtol=0)


@pytest.mark.parametrize(
    "family", ["llava", "qwen2_5_vl", "gemma3", "llama4", "lfm3_vl"], indirect=True
)
@each_budget
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_cache_that_is_reset_serves_another_prompt(family, budget, cuda_graph):
    prompts = [family.inputs(LONG), family.inputs(SHORT, seed=1)]
    expected = [eagerly(family, inputs, GREEDY, budget=budget) for inputs in prompts]
    with session_of(family, cuda_graph=cuda_graph, budget=budget) as session:
        cache = session.new_cache(max_new_tokens=8)
        for inputs, run in zip(prompts, expected, strict=True):
            out = family.model.generate(**inputs, **GREEDY, **{CACHE: cache})
            assert_same_run(out, run, ORACLE_ATOL)
            cache.reset()
            assert cache.get_seq_length() == 0 and cache.report() is None


def test_logits_are_the_callers_own(family):
    """Later steps do not write over them."""
    inputs = family.inputs(LONG)
    with session_of(family) as session, recorded_graphs(session), torch.no_grad():
        cache = session.new_cache(max_new_tokens=8)
        family.model(**inputs, **{CACHE: cache})
        outs, copies = [], []
        for step in range(4):
            position = torch.tensor([[inputs["input_ids"].shape[1] + step]])
            token = torch.tensor([[20 + step]])
            out = family.model(input_ids=token, position_ids=position, **{CACHE: cache})
            outs.append(out.logits)
            copies.append(out.logits.clone())
    for out, copy in zip(outs, copies, strict=True):
        assert torch.equal(out, copy)
    assert not torch.equal(outs[-1], outs[-2])


def test_calls_that_ask_for_more_are_eager(family):
    """Hidden states, here; and with gradients on, there must be something to differentiate."""
    inputs = family.inputs(LONG)
    arguments = dict(GREEDY, output_hidden_states=True)
    expected = eagerly(family, inputs, arguments)
    with session_of(family) as session:
        out = generate(family, inputs, arguments)
        assert session.graphs.num_captures == 0
        assert_same_run(out, expected, ORACLE_ATOL)
        assert len(out.hidden_states) == 8
        position = torch.tensor([[inputs["input_ids"].shape[1] + 7]])
        with torch.enable_grad():
            step = dict(input_ids=position * 0 + 7, position_ids=position)
            for _ in range(3):
                last = family.model(**step, **{CACHE: session.cache})
                assert last.logits.requires_grad
        assert session.graphs.num_captures == 0


@pytest.mark.parametrize("family", SOME, indirect=True)
@each_budget
def test_beam_search(family, budget):
    inputs = family.inputs(LONG, SHORT)
    arguments = dict(GREEDY, num_beams=2, max_new_tokens=10)
    expected = eagerly(family, inputs, arguments, budget=budget)
    with session_of(family, budget=budget):
        out = generate(family, inputs, arguments)
        assert_same_run(out, expected, ORACLE_ATOL)
        greedy = generate(family, inputs, GREEDY)  # and the session is as good as before
    assert_same_run(greedy, eagerly(family, inputs, GREEDY, budget=budget), ORACLE_ATOL)


@each_search
def test_where_capture_is_impossible_decoding_goes_on_eagerly(family, arguments):
    inputs = family.inputs(LONG, SHORT)
    expected = eagerly(family, inputs, arguments)

    def refuse(graph):
        raise RuntimeError("operation not permitted when stream is capturing")

    with vl_cache(family.model, budget=0.4, cuda_graph=True) as session:
        with (
            pytest.warns(UserWarning, match="^cuda_graph: .*not permitted") as seen,
            recorded_graphs(session),
            mock.patch.object(torch.cuda, "graph", refuse),
        ):
            out = generate(family, inputs, arguments)
            assert_same_run(out, expected, ORACLE_ATOL)
            assert_same_run(generate(family, inputs, arguments), expected, ORACLE_ATOL)
        assert len([w for w in seen if "cuda_graph" in str(w.message)]) == 1
        assert session.graphs.num_captures == 0


@pytest.mark.parametrize("family", ["muse_glimmer", "step3p7"], indirect=True)
def test_what_a_step_cannot_run_when_captured_is_run_eagerly(family):
    """A mask that is looked through for images; experts that the host chooses."""
    inputs = family.inputs(LONG, SHORT)
    expected = eagerly(family, inputs, GREEDY)
    with vl_cache(family.model, budget=0.4, cuda_graph=True) as session, recorded_graphs(session):
        with pytest.warns(UserWarning, match=r"^cuda_graph: .*not permitted"):
            out = generate(family, inputs, GREEDY)
        assert session.graphs.num_captures == 0
    assert_same_run(out, expected, ORACLE_ATOL)


@some_families
@pytest.mark.parametrize("recorded", [False, True])
def test_a_captured_step_keeps_no_cache_alive(family, recorded):
    """Memory is free as soon as the last name of a cache is gone: no collection is needed."""
    gc.collect()
    gc.disable()
    try:
        with session_of(family) as session:
            with recorded_graphs(session) if recorded else nullcontext():
                out = generate(family, family.inputs(LONG), GREEDY)
            assert session.graphs.num_captures == 1
            cache = weakref.ref(session.cache)
            assert isinstance(cache(), VLCache)
            session.cache = None
            del out
            assert cache() is None
    finally:
        gc.enable()


@every_family
def test_generate_reads_the_same_signature(family):
    before = inspect.signature(family.model.forward)
    with session_of(family):
        assert inspect.signature(family.model.forward) == before
        assert family.model.forward.__name__ == "forward"
    assert "forward" not in vars(family.model)


def test_logits_are_plausible(family):
    """Without this, equal runs might be equally constant."""
    inputs = family.inputs(LONG, SHORT)
    steps = logits(eagerly(family, inputs, GREEDY))
    assert steps.shape[:2] == (2, 8) and steps.isfinite().all()
    assert (steps[0, 1:] - steps[0, :-1]).abs().amax(-1).min() > 0.01
