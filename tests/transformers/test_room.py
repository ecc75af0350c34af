"""Rows that find no room are lost, and said to be where the host waits for the device anyway."""

from __future__ import annotations

import pytest
import torch
from families import LONG, SHORT
from recorded_graph import RecordedGraph, recorded_graphs

from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.names import CACHE
from vlcache_triton.pool.ragged import RaggedCache

LOST = r"^VLCache: got \d+ rows of new tokens that found no room .*max_new_tokens"
some_families = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"], indirect=True)


@pytest.fixture
def no_growth(monkeypatch):
    """The host believes that there is room."""
    monkeypatch.setattr(RaggedCache, "reserve", lambda self, n: False)


@torch.no_grad()
def decode_by_hand(family, inputs, cache, num_steps):
    out = family.model(**inputs, **{CACHE: cache})
    for _ in range(num_steps):
        token = out.logits[:, -1:].argmax(-1)
        out = family.model(input_ids=token, **{CACHE: cache})


@some_families
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_loop_beyond_the_room_it_asked_for_cannot_end_unseen(family, no_growth, cuda_graph):
    inputs = family.inputs(LONG, SHORT)
    with (
        pytest.raises(RuntimeError, match=LOST),
        vl_cache(family.model, budget=0.4, cuda_graph=cuda_graph) as session,
    ):
        decode_by_hand(family, inputs, session.new_cache(max_new_tokens=3), 4)
        with pytest.raises(RuntimeError, match=LOST):
            session.report()


@some_families
def test_room_that_is_used_up_is_enough(family, no_growth):
    with vl_cache(family.model, budget=0.4) as session:
        decode_by_hand(family, family.inputs(LONG, SHORT), session.new_cache(max_new_tokens=3), 3)
        assert session.cache.packed.ragged.room == 0
        assert session.report() is not None


@some_families
@pytest.mark.parametrize("way", ["stock", "lean"])
def test_no_answer_lacks_tokens_unseen(family, no_growth, way):
    """By either loop, of steps that are replayed; the next answer is right again."""
    inputs, arguments = family.inputs(LONG, SHORT), dict(max_new_tokens=8, do_sample=False)
    with vl_cache(family.model, budget=0.4, cuda_graph=True) as session, recorded_graphs(session):
        generate = session.generate if way == "lean" else family.model.generate
        expected = generate(**inputs, **arguments)
        with pytest.raises(RuntimeError, match=LOST):
            generate(**inputs, **arguments, **{CACHE: session.new_cache(max_new_tokens=3)})
        assert RecordedGraph.num_replays > 0
        assert torch.equal(generate(**inputs, **arguments), expected)


def test_an_error_inside_the_block_is_the_one_that_is_seen(family, no_growth):
    with pytest.raises(KeyError, match="mine"), vl_cache(family.model, budget=0.4) as session:
        decode_by_hand(family, family.inputs(LONG), session.new_cache(max_new_tokens=1), 3)
        raise KeyError("mine")
