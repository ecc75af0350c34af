"""One image, many questions: deep copies of a cache, and caches saved to disk and loaded again."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import families
import pytest
import torch
from checks import nothing_computed
from families import LONG, SHORT
from recorded_graph import RecordedGraph, recorded_graphs
from torch.nn.functional import pad

from vlcache_triton.integrations.transformers import VLCache, vl_cache
from vlcache_triton.integrations.transformers import cache as cache_module
from vlcache_triton.integrations.transformers.names import CACHE
from vlcache_triton.pool import ragged as ragged_module
from vlcache_triton.recipe.policies import POLICIES

QUESTIONS = [30, 31, 32, 33, 34], [41, 42], list(range(50, 75))
CHOICES = {
    "compressed": dict(budget=0.4),
    "whole": dict(budget=1.0),
    "remainder": dict(budget=0.4, remainder="mean"),
}
SOME = ["llava", "gemma3", "llama4", "lfm3_vl"]
some_families = pytest.mark.parametrize("family", SOME, indirect=True)
each_choice = pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
# By which loop questions are answered, and whether steps are captured.
each_way = pytest.mark.parametrize("way", ["eager", "captured", "recorded", "lean"])


def block(family, way="eager", **choices):
    return vl_cache(family.model, cuda_graph=way != "eager", **choices)


def graphs_of(session, way):
    return recorded_graphs(session) if way == "recorded" else nullcontext()


@torch.no_grad()
def read(family, session, inputs, max_new_tokens=64):
    """A cache that holds the prompt."""
    cache = session.new_cache(max_new_tokens)
    family.model(**inputs, **{CACHE: cache})
    return cache


def ask(family, session, inputs, cache, question, way="eager", new=8):
    """The answer to a question behind the prompt that is in the cache."""
    new_ids = torch.tensor([question]).expand(len(inputs["input_ids"]), -1)
    again = dict(
        input_ids=torch.cat([inputs["input_ids"], new_ids], 1),
        attention_mask=pad(inputs["attention_mask"], (0, len(question)), value=1),
    )
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            again[key] = pad(inputs[key], (0, len(question)))
    generate = session.generate if way in ("lean", "recorded") else family.model.generate
    out = generate(**again, **{CACHE: cache}, max_new_tokens=new, do_sample=False)
    return out[:, again["input_ids"].shape[1] :]


def dialogues(family, inputs, way="eager", questions=QUESTIONS, new=8, **choices):
    """Each question's answer on a fresh cache, which reads the image anew."""
    with block(family, way, **choices) as session:
        return [
            ask(family, session, inputs, read(family, session, inputs), question, way, new)
            for question in questions
        ]


def saved(cache):
    """Through a file and back."""
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@some_families
@each_choice
@each_way
def test_questions_on_copies_are_answered_as_in_dialogues_of_their_own(family, choices, way):
    inputs = family.inputs(LONG, SHORT)
    expected = dialogues(family, inputs, way, **choices)
    assert not torch.equal(expected[0], expected[1])
    with block(family, way, **choices) as session, graphs_of(session, way):
        cache = read(family, session, inputs)
        copies = [copy.deepcopy(cache) for _ in QUESTIONS]
        for question, other, answer in zip(QUESTIONS, copies, expected, strict=True):
            assert torch.equal(ask(family, session, inputs, other, question, way), answer)
        assert torch.equal(ask(family, session, inputs, cache, QUESTIONS[0], way), expected[0])
        assert way == "eager" or session.graphs.num_captures > 0
        assert way != "recorded" or RecordedGraph.num_replays > 0
    assert copies[0].report() == cache.report()
    assert (cache.report() is None) == (choices["budget"] == 1.0)


@some_families
@each_choice
def test_caches_from_files_answer_alike(family, choices):
    inputs = family.inputs(LONG, SHORT)
    for way in ("eager", "captured", "lean"):
        expected = dialogues(family, inputs, way, QUESTIONS[:2], **choices)
        with block(family, way, **choices) as session:
            cache = saved(read(family, session, inputs))
        with block(family, way, **choices) as session:
            for question, answer in zip(QUESTIONS, expected, strict=False):
                other = saved(cache)
                assert torch.equal(ask(family, session, inputs, other, question, way), answer)


@pytest.mark.parametrize("family", ["llava", "gemma3", "lfm3_vl"], indirect=True)
@each_way
def test_a_copy_of_an_answered_cache_goes_on_with_the_dialogue(family, way):
    """Behind steps: head room used up, rings turned, tokens taken back."""
    inputs = family.inputs(LONG)
    with block(family, way, budget=0.4) as session, graphs_of(session, way):
        cache = read(family, session, inputs)
        first = ask(family, session, inputs, cache, QUESTIONS[0], way, new=20)
        more = dict(
            input_ids=torch.cat([inputs["input_ids"], torch.tensor([QUESTIONS[0]]), first], 1)
        )
        more["attention_mask"] = torch.ones_like(more["input_ids"])
        if "token_type_ids" in inputs:
            more["token_type_ids"] = pad(inputs["token_type_ids"], (0, 25))
        others = [copy.deepcopy(cache), saved(cache), copy.deepcopy(saved(cache))]
        expected = ask(family, session, more, cache, QUESTIONS[1], way)
        for other in others:
            assert torch.equal(ask(family, session, more, other, QUESTIONS[1], way), expected)


@pytest.mark.parametrize("family", ["llava", "gemma3", "lfm3_vl"], indirect=True)
@pytest.mark.parametrize("choices", [CHOICES["compressed"], CHOICES["remainder"]], ids=str)
@pytest.mark.parametrize("way", ["eager", "captured", "lean"])
def test_a_copy_that_outgrows_its_room_leaves_the_original_alone(family, choices, way, monkeypatch):
    inputs = family.inputs(LONG)
    expected, long = dialogues(family, inputs, way, QUESTIONS[1:], new=24, **choices)
    monkeypatch.setattr(cache_module, "MAX_HEAD_ROOM", 2)
    monkeypatch.setattr(ragged_module, "GROWTH", 1)
    with block(family, way, **choices) as session:
        cache = read(family, session, inputs, max_new_tokens=2)
        before = [x.clone() for x in tensors_of(cache)]
        other = copy.deepcopy(cache)
        out = ask(family, session, inputs, other, QUESTIONS[2], way, new=24)
        assert torch.equal(out, long)
        assert other.get_seq_length() > cache.get_seq_length() == inputs["input_ids"].shape[1]
        for tensor, old in zip(tensors_of(cache), before, strict=True):
            torch.testing.assert_close(tensor, old, atol=0, rtol=0, equal_nan=True)
        out = ask(family, session, inputs, cache, QUESTIONS[1], way, new=24)
        assert torch.equal(out, expected)


def tensors_of(cache):
    """What a step changes in place, where it is defined."""
    live = torch.arange(cache.ragged.max_seqlen_k) < cache.ragged.seqused_k[..., None]
    rows = (cache.ragged.cu_seqlens_k[:, :-1, None] + live.cumsum(-1) - 1)[live]
    rings, states = cache.packed.rings, cache.packed.states
    of_rings = [] if rings is None else [rings.k, rings._positions]
    of_states = [] if states is None else states.tensors
    segments = [cache.ragged.k[rows], cache.ragged.v[rows], cache.ragged.seqused_k]
    return [*segments, *of_rings, *of_states]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "qwen3_5"], indirect=True)
@each_way
def test_a_copy_repeated_takes_a_batch_of_questions(family, way):
    inputs = family.inputs(LONG, SHORT)
    expected = dialogues(family, inputs, way, QUESTIONS[:1], budget=0.4)[0]
    batch = {name: x.repeat_interleave(2, 0) for name, x in inputs.items() if len(x) == 2}
    with block(family, way, budget=0.4) as session, graphs_of(session, way):
        other = copy.deepcopy(read(family, session, inputs))
        other.batch_repeat_interleave(2)
        out = ask(family, session, batch, other, QUESTIONS[0], way)
    assert torch.equal(out, expected.repeat_interleave(2, 0))


@pytest.mark.parametrize("make", [copy.deepcopy, saved], ids=["copied", "saved"])
def test_a_cache_keeps_its_backend(family, make):
    inputs = family.inputs(SHORT)
    with vl_cache(family.model, budget=0.4, backend="triton") as session:
        cache = read(family, session, inputs)
        other = make(cache)
        assert other.ragged.backend == cache.ragged.backend
        assert other.ragged.backend.name == "triton"


def test_copies_in_a_row_share_captured_steps(family):
    inputs = family.inputs(LONG)
    with block(family, "captured", budget=0.4) as session:
        cache = read(family, session, inputs)
        for way in ("captured", "lean"):
            counts = []
            for question in QUESTIONS[:2] * 2:
                other = copy.deepcopy(cache)
                ask(family, session, inputs, other, question, way)
                del other
                session.cache = cache
                counts.append(session.graphs.num_captures)
            assert counts[0] == counts[-1]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "glm4v"], indirect=True)
@each_way
def test_positions_are_those_of_the_caches_own_image(family, way):
    """Models of M-RoPE note on themselves how far positions lag behind, at each prompt."""
    inputs, others = family.inputs(LONG), family.inputs([1, 2, "picture", "picture", 8, 9], seed=1)
    expected = dialogues(family, inputs, way, QUESTIONS[:2], budget=0.4)
    with block(family, way, budget=0.4) as session, graphs_of(session, way):
        cache = read(family, session, inputs)
        file = io.BytesIO()
        torch.save(cache, file)
        read(family, session, others)
        assert torch.equal(
            ask(family, session, inputs, copy.deepcopy(cache), QUESTIONS[0], way), expected[0]
        )
        family.model.model.rope_deltas = None  # as in another process
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(ask(family, session, inputs, loaded, QUESTIONS[1], way), expected[1])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_5"], indirect=True)
@pytest.mark.parametrize("cuda_graph", [False, True])
@torch.no_grad()
def test_steps_by_hand_on_copies_interleave(family, cuda_graph):
    """Of two prompts whose positions lag behind by different numbers."""
    prompts = family.inputs(LONG), family.inputs([1, 2, "picture", "picture", 8, 9], seed=1)

    def decode(order):
        with vl_cache(family.model, budget=0.4, cuda_graph=cuda_graph) as session:
            caches = {which: read(family, session, prompts[which]) for which in sorted(set(order))}
            caches = copy.deepcopy(caches)
            logits = {which: [] for which in caches}
            for which in order:
                step = torch.tensor([[7 + len(logits[which])]])
                out = family.model(input_ids=step, **{CACHE: caches[which]})
                logits[which].append(out.logits)
        return {which: torch.cat(rows, 1) for which, rows in logits.items()}

    expected = decode([0] * 4) | decode([1] * 4)
    torch.testing.assert_close(decode([0, 1, 1, 0, 0, 1, 0, 1]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [copy.deepcopy, saved], ids=["copied", "saved"])
@pytest.mark.parametrize("budget", [0.4, 1.0])
@pytest.mark.parametrize("family", ["llava", "gemma3", "lfm3_vl"], indirect=True)
def test_empty_caches_and_prefixes(family, make, budget):
    """Before there is an image to be compressed."""
    inputs = family.inputs([*range(2, 12), *LONG])
    whole = {name: inputs.pop(name) for name in list(inputs) if not name.endswith("_ids")}
    text = {name: x[:, :10] for name, x in inputs.items()}
    rest = {name: x[:, 10:] for name, x in inputs.items()} | whole
    text["attention_mask"] = whole["attention_mask"][:, :10]

    @torch.no_grad()
    def run(make):
        with vl_cache(family.model, budget=budget, cuda_graph=False) as session:
            cache = make(session.new_cache(max_new_tokens=64))
            family.model(**text, **{CACHE: cache})
            cache = make(cache)
            out = family.model(**rest, **{CACHE: cache})
            cache = make(cache)
            step = family.model(input_ids=torch.tensor([[7]]), **{CACHE: cache})
            return cache, torch.cat([out.logits[:, -1], step.logits[:, -1]])

    (cache, logits), (_, expected) = run(make), run(lambda cache: cache)
    assert cache.is_compressed == (budget < 1.0)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("family", ["llava", "gemma3", "lfm3_vl"], indirect=True)
@pytest.mark.parametrize("first", ["eager", "captured"])
@pytest.mark.parametrize("way", ["eager", "captured", "lean"])
def test_a_cache_serves_a_later_block(family, first, way):
    """The cache itself, a copy made after its block, and one that captures nothing before."""
    inputs = family.inputs(LONG)
    expected = dialogues(family, inputs, way, QUESTIONS[:2], budget=0.4)
    with block(family, first, budget=0.4) as session:
        cache = read(family, session, inputs)
    copies = copy.deepcopy(cache), cache
    with block(family, way, budget=0.4) as session:
        for question, other, answer in zip(QUESTIONS, copies, expected, strict=False):
            assert torch.equal(ask(family, session, inputs, other, question, way), answer)


def test_the_lean_loop_does_not_go_on_from_a_dense_cache(family):
    inputs = family.inputs(LONG)
    with block(family, budget=1.0) as session:
        cache = read(family, session, inputs)
        with pytest.raises(ValueError, match=rf"^{CACHE}: got a whole cache .* another loop"):
            ask(family, session, inputs, cache, QUESTIONS[0], "lean")


def test_a_copy_of_a_closed_blocks_cache_is_nobodys_loan(family):
    inputs = family.inputs(LONG)
    with block(family, "captured", budget=0.4) as session:
        cache = read(family, session, inputs)
    assert not session.allocator._pools
    assert copy.deepcopy(cache).ragged.k.data_ptr() != cache.ragged.k.data_ptr()
    assert not session.allocator._pools


def test_a_cache_amid_a_pass_is_not_copied(family, monkeypatch):
    inputs, tries = family.inputs(LONG), []
    with vl_cache(family.model, budget=0.4) as session:
        cache = read(family, session, inputs)
        layer = type(cache.layers[0])
        update = layer.update

        def copying(self, *args, **kwargs):
            with pytest.raises(ValueError, match=r"^VLCache: got one amid a forward pass"):
                copy.deepcopy(cache)
            tries.append(self.index)
            return update(self, *args, **kwargs)

        monkeypatch.setattr(layer, "update", copying)
        with torch.no_grad():
            family.model(input_ids=torch.tensor([[7]]), **{CACHE: cache})
        assert len(tries) == len(cache.layers)
        copy.deepcopy(cache)
        with pytest.raises(NotImplementedError, match=r"^copy\.copy: got a VLCache"):
            copy.copy(cache)


CHILD = """
import sys, torch
sys.path[:0] = {path!r}
import families, test_copies
from vlcache_triton.integrations.transformers import vl_cache
out = {{}}
for name, file, inputs in torch.load({todo!r}, weights_only=False):
    family = families.build(name)
    for way in ("eager", "captured", "lean"):
        cache = torch.load(file, weights_only=False)
        with test_copies.block(family, way, budget=0.7) as session:
            question = test_copies.QUESTIONS[0]
            out[name, way] = test_copies.ask(family, session, inputs, cache, question, way)
torch.save(out, {done!r})
"""


def test_another_process_answers_alike(tmp_path):
    expected, todo = {}, []
    for name in ("llava", "qwen2_5_vl", "gemma3"):
        family = families.build(name)
        inputs = family.inputs(LONG, SHORT)
        choices = CHOICES["remainder"]
        for way in ("eager", "captured", "lean"):
            expected[name, way] = dialogues(family, inputs, way, QUESTIONS[:1], **choices)[0]
        with block(family, **choices) as session:
            torch.save(read(family, session, inputs), tmp_path / name)
        todo.append((name, str(tmp_path / name), inputs))
    files = dict(todo=str(tmp_path / "todo"), done=str(tmp_path / "done"))
    torch.save(todo, files["todo"])
    child = CHILD.format(path=[p for p in sys.path if p] + [str(Path(__file__).parent)], **files)
    subprocess.run([sys.executable, "-c", child], check=True)
    out = torch.load(files["done"])
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[key], expected[key]) for key in out)


def test_a_file_holds_what_is_kept(family):
    """No head room, and no memory that nobody has written."""
    inputs = family.inputs(LONG)

    def size(cache):
        file = io.BytesIO()
        torch.save(cache, file)
        return file.tell()

    with vl_cache(family.model, budget=0.4) as session:
        caches = [read(family, session, inputs, new) for new in (1, 200)]
        assert caches[1].ragged.nbytes > 2 * caches[0].ragged.nbytes
        assert abs(size(caches[1]) - size(caches[0])) < 100
        loaded = saved(caches[1])
        assert loaded.ragged.nbytes == caches[1].ragged.nbytes
        assert loaded.ragged.room == caches[1].ragged.room
        assert torch.equal(loaded.ragged.cu_seqlens_k, caches[1].ragged.cu_seqlens_k)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_every_policys_cache_can_be_saved(family, policy):
    inputs = family.inputs(LONG)

    def reads(cache):
        with torch.no_grad(), vl_cache(family.model, budget=0.4, policy=policy):
            return family.model(**inputs, **{CACHE: cache}).logits, cache.plan

    cache = VLCache(family.model.config, policy=policy)
    logits, plan = reads(cache)
    loaded = saved(cache)
    assert loaded.policy.name == policy.name and loaded.report() == cache.report()
    loaded.reset()
    again, new = reads(loaded)
    assert torch.equal(again, logits)
    assert plan is new is None or torch.equal(new.indices, plan.indices)


def other_models():
    named = families.build("llava")
    named.model.config.name_or_path = "/models/another-llava"
    return {
        "family": (families.build("qwen2_5_vl"), "qwen2_5_vl"),
        "shapes": (families.build("llava", num_hidden_layers=3), "num_hidden_layers=3"),
        "name": (named, "'another-llava'"),
    }


@pytest.mark.parametrize("case", ["family", "shapes", "name"])
@pytest.mark.parametrize("make", [lambda cache: cache, copy.deepcopy, saved])
@pytest.mark.parametrize("is_empty", [False, True])
def test_another_models_cache_is_refused(family, case, make, is_empty):
    other, called = other_models()[case]
    inputs = family.inputs(LONG)
    with vl_cache(family.model, budget=0.4) as session:
        cache = session.new_cache() if is_empty else read(family, session, inputs)
    cache = make(cache)
    message = rf"^{CACHE}: got one of llava .*num_hidden_layers=4.*, expected one of .*{called}"
    ids = torch.tensor([[7]])
    with vl_cache(other.model, budget=0.4) as session, nothing_computed(other.model):
        for run in (
            lambda: other.model(input_ids=ids, **{CACHE: cache}),
            lambda: other.model.generate(input_ids=ids, **{CACHE: cache}, max_new_tokens=2),
            lambda: session.generate(input_ids=ids, **{CACHE: cache}, max_new_tokens=2),
        ):
            with pytest.raises(ValueError, match=message):
                run()


def test_a_renamed_folder_is_the_same_model(family):
    config = copy.deepcopy(family.model.config)
    caches = []
    for name in ("somebody/llava-7b", "/models/llava-7b", "/models/llava-7b/"):
        config.name_or_path = name
        caches.append(VLCache(config))
    assert len({cache.made_for for cache in caches}) == 1
