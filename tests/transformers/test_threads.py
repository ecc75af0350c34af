"""Threads of one session: each has caches, and reports, of its own."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from families import LONG, SHORT

from vlcache_triton.integrations.transformers import session as session_module
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.names import CACHE

NUM_THREADS = 4


@pytest.fixture
def impatient():
    """Threads take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(call):
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(call, range(NUM_THREADS)))


def test_no_cache_is_handed_out_twice(family, monkeypatch):
    """All threads are held up between making a cache and handing it out."""
    barrier = Barrier(NUM_THREADS)
    make = session_module.VLCache

    class Held:
        def __set_name__(self, owner, name):
            self.name = name

        def __get__(self, session, owner):
            return session.__dict__.get("held")

        def __set__(self, session, cache):
            session.__dict__["held"] = cache
            if cache is not None:
                barrier.wait(timeout=60)

    def held(*args, **kwargs):
        return make(*args, **kwargs)

    with vl_cache(family.model, budget=0.4) as session:
        monkeypatch.setattr(session_module, "VLCache", held)
        monkeypatch.setattr(type(session), "cache", Held(), raising=False)
        caches = in_threads(lambda _: session.new_cache())
    assert len({id(cache) for cache in caches}) == NUM_THREADS


def test_a_report_is_of_the_threads_own_prompt(family):
    prompts = [[*LONG, *range(20, 20 + i)] for i in range(NUM_THREADS)]
    inputs = [family.inputs(prompt) for prompt in prompts]
    barrier = Barrier(NUM_THREADS)
    with vl_cache(family.model, budget=0.4) as session:

        def report(i):
            family.model.generate(**inputs[i], max_new_tokens=2, do_sample=False)
            barrier.wait(timeout=60)
            return session.report().lengths

        lengths = in_threads(report)
        # A thread that has read no prompt sees the latest: of a `generate` that streams, say.
        assert session.report().lengths in lengths
    assert lengths == [[x["input_ids"].shape[1]] for x in inputs]


@pytest.mark.parametrize("cuda_graph", [False, True])
@torch.no_grad()
def test_threads_answer_as_one(family, impatient, cuda_graph):
    inputs = [family.inputs(LONG), family.inputs(SHORT, seed=1)]
    arguments = dict(max_new_tokens=4, do_sample=False)
    with vl_cache(family.model, budget=0.4, cuda_graph=cuda_graph) as session:
        expected = [family.model.generate(**x, **arguments) for x in inputs]

        def answer(i):
            out = family.model.generate(**inputs[i % 2], **arguments)
            by_hand = family.model(**inputs[i % 2])
            assert by_hand[CACHE].is_compressed
            return out, session.cache is by_hand[CACHE]

        for i, (out, is_own) in enumerate(in_threads(answer)):
            assert torch.equal(out, expected[i % 2]) and is_own
