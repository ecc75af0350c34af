"""Images of later turns, against the stock model whose full cache is masked by the same rule."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import ExitStack

import oracle
import pytest
import torch
from checks import ORACLE_ATOL
from families import LONG, MROPE, PICTURE, SHORT
from recorded_graph import RecordedGraph, recorded_graphs
from test_copies import saved

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.names import CACHE
from vlcache_triton.recipe import policies

CONFIG = VLCacheConfig(budget=0.4)
CHOICES = {
    "paper": CONFIG,
    "row": VLCacheConfig(budget=0.4, remainder="mean"),
    "bound": VLCacheConfig(budget=0.4, max_cache_tokens=18),
    "row, bound": VLCacheConfig(budget=0.4, remainder="mean", max_cache_tokens=18),
}
each_choice = pytest.mark.parametrize("config", CHOICES.values(), ids=CHOICES)
IMAGE_TURN = [30, 31, PICTURE, *range(32, 40)]
OTHER_TURN = [60, PICTURE, *range(61, 66)]
TEXT_TURN = list(range(70, 82))
STEPS = [[7], [8], [9]]


LATER = (
    "input_ids",
    "pixel_values",
    "image_sizes",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
)


def passes(family, *prompts):
    """A prompt, steps, a turn with an image, steps, one of text, another image, steps."""

    def rows(prompt, seed=0):
        inputs = family.inputs(*[prompt] * len(prompts), seed=seed)
        return {k: v for k, v in inputs.items() if k in LATER}

    first, steps = family.inputs(*prompts), [rows(step) for step in STEPS]
    turns = [rows(IMAGE_TURN, seed=1), *steps, rows(TEXT_TURN), rows(OTHER_TURN, seed=2), *steps]
    num_seen, later = first["input_ids"].shape[1], []
    for inputs in [*steps, *turns]:
        # For captured steps; where positions lag behind the length, the model knows how far.
        if inputs["input_ids"].shape[1] == 1 and family.name not in MROPE:
            position_ids = torch.full_like(inputs["input_ids"], num_seen)
            inputs = dict(inputs, position_ids=position_ids)
        later.append(inputs)
        num_seen += inputs["input_ids"].shape[1]
    return [first, *later]


def stock(family, config, passes):
    """Of each pass: its logits, the rows of all heads, and what was kept of the latest image's."""
    dialogue = oracle.Dialogue(family, config)
    return [(dialogue.read(x), dialogue.live_rows(), dialogue.counts) for x in passes]


@torch.no_grad()
def read(family, cache, inputs):
    """The logits of a pass."""
    return family.model(**inputs, **{CACHE: cache}, use_cache=True).logits


def real_rows(inputs):
    """Which rows of a pass are no pads."""
    ids = inputs["input_ids"]
    return inputs.get("attention_mask", torch.ones_like(ids))[:, -ids.shape[1] :] == 1


def assert_same(family, config, passes, way="eager"):
    """Logits, rows of every head and what is kept of each image are the stock model's."""
    expected = stock(family, config, passes)
    with ExitStack() as stack:
        session = stack.enter_context(vl_cache(family.model, config, cuda_graph=way != "eager"))
        if way == "recorded":
            stack.enter_context(recorded_graphs(session))
        cache = session.new_cache(max_new_tokens=4)
        for inputs, (logits, rows, counts) in zip(passes, expected, strict=True):
            out, real = read(family, cache, inputs), real_rows(inputs)
            torch.testing.assert_close(out[real], logits[real], atol=ORACLE_ATOL, rtol=0)
            live = cache.ragged.seqused_k.view_as(rows)
            assert torch.equal(live.long(), rows)
            if "pixel_values" in inputs:
                assert torch.equal(cache.plan.keep, counts)
                assert session.report().kept == rows[..., 0].tolist()
        assert way != "recorded" or RecordedGraph.num_replays > 0
    return session.report()


@pytest.mark.parametrize("way", ["eager", "recorded"])
@each_choice
def test_every_turn_equals_the_masked_full_cache(family, config, way):
    report = assert_same(family, config, passes(family, LONG), way)
    num_seen = sum(x["input_ids"].shape[1] for x in passes(family, LONG))
    assert report.segments == 3 and report.lengths == [num_seen - len(STEPS)]


@pytest.mark.parametrize(
    "family", ["mistral3", "llama4", "gemma3", "lfm2_vl", "internvl_gpt_oss"], indirect=True
)
def test_other_layers_pass_by(family):
    """Windows, chunks and states beside what is compressed."""
    assert_same(family, CHOICES["row, bound"], passes(family, LONG), "recorded")


@pytest.mark.parametrize("family", ["mistral3", "gemma3", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("way", ["eager", "captured"])
def test_prompts_of_unequal_length(family, way):
    assert_same(family, CHOICES["row, bound"], passes(family, LONG, SHORT), way)


def test_budgets_are_exact(family):
    """Each turn adds its share of its own rows, over all layers; nothing else goes."""
    with vl_cache(family.model, CONFIG, cuda_graph=False) as session:
        cache = session.new_cache(max_new_tokens=8)
        num_rows = 0
        for inputs in passes(family, LONG):
            read(family, cache, inputs)
            n, share = inputs["input_ids"].shape[1], 0.4 if "pixel_values" in inputs else 1
            num_rows += round(share * n * len(cache.contents.layers))
            live = cache.ragged.seqused_k[:, :: cache.ragged.num_kv_heads]
            assert int(live[:, 0].sum()) == num_rows


def without_room(report):
    """Of lent memory there is some more."""
    return report and dataclasses.replace(report, bytes_allocated=0)


@pytest.mark.parametrize("family", ["llava", "gemma3"], indirect=True)
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("make", [copy.deepcopy, saved], ids=["copied", "saved"])
def test_copies_go_on_alike(family, make, cuda_graph):
    config = CHOICES["row, bound"]
    with vl_cache(family.model, config, cuda_graph=cuda_graph) as session:
        cache = session.new_cache(max_new_tokens=8)
        for inputs in passes(family, LONG, SHORT):
            other = make(cache)
            out = read(family, cache, inputs)
            assert torch.equal(read(family, other, inputs), out)
            assert without_room(other.report()) == without_room(cache.report())
        assert cache.report().segments == 3


def test_memory_is_for_what_is_kept(family):
    """Nothing of the turn's dense rows stays, in the cache or with whom lends it."""
    turn = {k: v for k, v in family.inputs([30, *[PICTURE] * 12, 31]).items() if k in LATER}
    with vl_cache(family.model, CONFIG, cuda_graph=True) as session:
        cache = session.new_cache(max_new_tokens=8)
        read(family, cache, family.inputs(LONG))
        before = len(cache.ragged.k)
        read(family, cache, turn)
        live = int(cache.ragged.seqused_k.sum())
        assert before < len(cache.ragged.k) <= 1.125 * (live + 8 * cache.ragged.seqused_k.numel())
        assert [pool.ragged for pool in session.allocator._pools] == [cache.ragged]
        assert session.report().bytes_allocated == cache.ragged.nbytes


@pytest.mark.parametrize(
    "policy", [p for p in policies.POLICIES if p.name != "full"], ids=lambda p: p.name
)
def test_policies_rank_turns_too(family, policy):
    """Budgets stay exact, also where heads share them."""
    with vl_cache(family.model, CONFIG, policy=policy) as session:
        cache = session.new_cache(max_new_tokens=8)
        num_rows = 0
        for inputs in passes(family, LONG):
            read(family, cache, inputs)
            n, share = inputs["input_ids"].shape[1], 0.4 if "pixel_values" in inputs else 1
            layers, heads = len(cache.contents.layers), cache.ragged.num_kv_heads
            num_rows += heads * round(share * n * layers)
            assert int(cache.ragged.seqused_k.sum()) == num_rows


def test_the_kernels_in_the_interpreter(family):
    config = VLCacheConfig(budget=0.4, remainder="mean", max_cache_tokens=12)
    outs = []
    for backend in ("triton", "reference"):
        with vl_cache(family.model, config, backend=backend) as session:
            cache = session.new_cache(max_new_tokens=8)
            turns = [family.inputs([1, PICTURE, 7, 8]), family.inputs([2, PICTURE, 9], seed=1)]
            turns[1].pop("attention_mask")
            outs.append([read(family, cache, x) for x in (*turns, STEP)][1:])
    for out, expected in zip(*outs, strict=True):
        torch.testing.assert_close(out, expected, atol=ORACLE_ATOL, rtol=0)


STEP = dict(input_ids=torch.tensor([[7]]))


def test_a_bound_at_full_budget(family):
    """Everything is kept until there is too much."""
    config = VLCacheConfig(budget=1.0, max_cache_tokens=40)
    expected = stock(family, config, passes(family, LONG))
    with vl_cache(family.model, config) as session:
        cache = session.new_cache(max_new_tokens=8)
        rows = []
        for inputs, (logits, live, _) in zip(passes(family, LONG), expected, strict=True):
            out = read(family, cache, inputs)
            torch.testing.assert_close(out, logits, atol=ORACLE_ATOL, rtol=0)
            assert torch.equal(cache.ragged.seqused_k.view_as(live).long(), live)
            rows.append(float(live.double().mean()))
    assert rows[0] == 30 and rows[4] == 40 and rows[8:10] == [40, 40]
    assert rows[5:8] == [41, 42, 43] and rows[-1] == 43


def test_a_lossless_cache_says_nothing_and_keeps_all(family, recwarn):
    with vl_cache(family.model, budget=1.0, cuda_graph=True) as session:
        cache = session.new_cache(max_new_tokens=8)
        num_rows = 0
        for inputs in passes(family, LONG):
            read(family, cache, inputs)
            num_rows += inputs["input_ids"].shape[1]
            assert (cache.ragged.seqused_k == num_rows).all()
        assert session.report() is None
    assert not [w for w in recwarn if "left whole" in str(w.message)]


def test_the_second_turn_of_generate(family):
    """With the new image's pixels alone, as Transformers takes them."""
    first, turn = family.inputs(LONG), family.inputs(IMAGE_TURN, seed=1)
    greedy = dict(max_new_tokens=5, do_sample=False)

    def two_turns(generate, cache):
        said = generate(**first, **greedy, **{CACHE: cache})
        again = torch.cat([said, turn["input_ids"]], 1)
        inputs = dict(input_ids=again, attention_mask=torch.ones_like(again))
        pixels = {k: v for k, v in turn.items() if k.startswith("pixel")}
        return generate(**inputs, **pixels, **greedy, **{CACHE: cache})

    outs = []
    for cuda_graph in (False, True):
        with vl_cache(family.model, CONFIG, cuda_graph=cuda_graph) as session:
            generate = session.generate if cuda_graph else family.model.generate
            outs.append(two_turns(generate, session.new_cache(max_new_tokens=8)))
            assert session.report().segments == 2
    assert torch.equal(*outs)
    dialogue = oracle.Dialogue(family, CONFIG)
    dialogue.read(first)
    ids = outs[0][:, first["input_ids"].shape[1] :]
    for i in range(4):
        dialogue.read(dict(input_ids=ids[:, i : i + 1]))
    length = 1 + turn["input_ids"].shape[1]
    pixels = {k: v for k, v in turn.items() if k.startswith("pixel")}
    logits = dialogue.read(dict(input_ids=ids[:, 4 : 4 + length], **pixels))
    for i in range(4 + length, ids.shape[1]):
        assert int(logits[0, -1].argmax()) == int(ids[0, i])
        logits = dialogue.read(dict(input_ids=ids[:, i : i + 1]))


def padded_turns(family, *turns):
    """Passes of unequal prompts, padded on the left, with the mask of all that is read; and those
    of each sequence alone."""
    mask, together, alone = None, [], [[] for _ in turns[0]]
    for seed, prompts in enumerate(turns):
        inputs = family.inputs(*prompts, seed=seed)
        marks = {} if mask is not None else {k: v for k, v in inputs.items() if k not in LATER}
        now = inputs["attention_mask"]
        mask = now if mask is None else torch.cat([mask, now], 1)
        ids, pixels = inputs["input_ids"], inputs.get("pixel_values")
        n, num_images = ids.shape[1], 0
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -n:]
        rows = {k: v for k, v in inputs.items() if k in LATER}
        together.append(dict(marks | rows, attention_mask=mask, position_ids=position_ids))
        for seq, prompt in enumerate(prompts):
            real = now[seq] == 1
            own = dict(
                input_ids=ids[seq : seq + 1, real],
                attention_mask=mask[seq : seq + 1, mask[seq] == 1],
                position_ids=position_ids[seq : seq + 1, real],
            )
            if "token_type_ids" in marks:
                own["token_type_ids"] = marks["token_type_ids"][seq : seq + 1, real]
            if (images := prompt.count(PICTURE)) and pixels is not None:
                own["pixel_values"] = pixels[num_images : num_images + images]
                num_images += images
            alone[seq].append(own)
    return together, alone


@pytest.mark.parametrize("family", ["llava", "gemma3"], indirect=True)
@pytest.mark.parametrize("way", ["eager", "recorded"])
@pytest.mark.parametrize("config", [CHOICES["paper"], CHOICES["row, bound"]], ids=["paper", "all"])
def test_padded_turns_some_without_an_image(family, config, way):
    """Each sequence is as alone: pads between turns are nowhere, not in windows either. (Llama4
    scales queries by how much has been read, pads included, in plain Transformers too.)"""
    steps = [[[7], [8]]] * 3
    together, alone = padded_turns(
        family,
        [LONG, SHORT],
        [OTHER_TURN, IMAGE_TURN],
        *steps,
        [[40, 41, 42], IMAGE_TURN],
        [list(range(50, 70)), [51, 52]],
        *steps,
    )
    expected = [stock(family, config, passes) for passes in alone]
    with ExitStack() as stack:
        session = stack.enter_context(vl_cache(family.model, config, cuda_graph=way != "eager"))
        if way == "recorded":
            stack.enter_context(recorded_graphs(session))
        cache = session.new_cache(max_new_tokens=4)
        for i, inputs in enumerate(together):
            out, real = read(family, cache, inputs), real_rows(inputs)
            live = cache.ragged.seqused_k.view(len(cache.contents.layers), 2, -1)
            for seq in range(2):
                logits, rows, _ = expected[seq][i]
                torch.testing.assert_close(out[seq, real[seq]], logits[0], atol=ORACLE_ATOL, rtol=0)
                assert torch.equal(live[:, seq].long(), rows[:, 0])
        assert way != "recorded" or RecordedGraph.num_replays > 0
    report = session.report()
    assert report.segments == 3
    seen = together[-1]["attention_mask"].sum(1)
    since = [3, 3] if config.max_cache_tokens else [23, 5]  # the text was cut as well, or was not
    assert report.lengths == (seen - torch.tensor(since)).tolist()
