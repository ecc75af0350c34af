"""Evicted tokens leave no bytes behind: storages are counted, not what the report says."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from families import PICTURE, build
from torch import nn

from vlcache_triton.integrations.transformers import vl_cache

PROMPT = [1, *[5 + i % 90 for i in range(500)], PICTURE, *range(7, 17)]
HEAD_DIM = 64
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def wide():
    """A LLaVA whose KV is large beside all that a cache notes about it."""
    return build("llava", head_dim=HEAD_DIM)


def storage_bytes(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def all_tensors():
    """Those with bytes: what tests of compiled operators leave of fake tensors has none."""
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]


def tensors_of(root):
    """Every tensor that an object holds on to, models left out."""
    found, seen, stack = [], set(), [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, (type, nn.Module)) or callable(item):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, (list, tuple, set)):
            stack += item
        elif hasattr(item, "__dict__"):
            stack += vars(item).values()
        stack += [getattr(item, name, None) for name in getattr(type(item), "__slots__", ())]
    return found


def token_bytes(family):
    """K and V of one token in all layers."""
    text = family.text_config
    return text.num_hidden_layers * 2 * text.num_key_value_heads * HEAD_DIM * 4


@torch.no_grad()
def prefill(session, inputs, model):
    cache = session.new_cache(max_new_tokens=NEW_TOKENS)
    model(**inputs, cache=cache)
    return cache


@pytest.mark.parametrize("budget", [0.1, 0.4])
@pytest.mark.parametrize("num_seqs", [1, 3])
def test_a_compressed_cache_holds_its_share_and_no_more(wide, budget, num_seqs):
    inputs = wide.inputs(*[PROMPT] * num_seqs)
    full = int(inputs["attention_mask"].sum()) * token_bytes(wide)
    reserve = num_seqs * NEW_TOKENS * token_bytes(wide)
    with vl_cache(wide.model, budget=budget) as session:
        prefill(session, inputs, wide.model)  # what is made once stays out of the count
    del session
    before = storage_bytes(all_tensors())
    with vl_cache(wide.model, budget=budget) as session:
        cache = prefill(session, inputs, wide.model)
        held = storage_bytes(tensors_of(cache))
        grown = storage_bytes(all_tensors()) - before
    assert budget * full * 0.99 <= held <= budget * full * 1.03 + reserve
    assert budget * full * 0.99 <= grown <= budget * full * 1.03 + reserve


@pytest.mark.parametrize("num_seqs", [1, 3])
def test_fp8_holds_half_of_it(wide, num_seqs):
    """Beside a model in bf16; with a scale for each head, and nothing in place of what is saved."""
    model, inputs = copy.deepcopy(wide.model).bfloat16(), wide.inputs(*[PROMPT] * num_seqs)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()

    def held_and_grown(dtype):
        choices = dict(budget=0.4, kv_cache_dtype=dtype)
        with vl_cache(model, **choices) as session:
            prefill(session, inputs, model)  # what is made once stays out of the count
        del session
        before = storage_bytes(all_tensors())
        with vl_cache(model, **choices) as session:
            cache = prefill(session, inputs, model)
            held = storage_bytes(tensors_of(cache))
            assert cache.ragged.nbytes == cache.ragged.k.nbytes + cache.ragged.v.nbytes
            return held, storage_bytes(all_tensors()) - before, cache.ragged.nbytes

    (held, grown, pools), (dense_held, dense_grown, dense_pools) = map(
        held_and_grown, ("fp8_e4m3", "auto")
    )
    assert 2 * pools == dense_pools
    assert held < 0.53 * dense_held and grown < 0.53 * dense_grown


def test_a_full_cache_holds_all(wide):
    """The counting itself: at budget 1.0 it finds the whole cache."""
    inputs = wide.inputs(PROMPT)
    full = int(inputs["attention_mask"].sum()) * token_bytes(wide)
    with vl_cache(wide.model, budget=1.0) as session:
        held = storage_bytes(tensors_of(prefill(session, inputs, wide.model)))
    assert held == pytest.approx(full, rel=0.03)


def test_left_pads_take_no_memory_once_compressed(wide):
    inputs = wide.inputs(PROMPT, PROMPT[-12:])
    real = int(inputs["attention_mask"].sum()) * token_bytes(wide)
    with vl_cache(wide.model, budget=0.4) as session:
        held = storage_bytes(tensors_of(prefill(session, inputs, wide.model)))
    assert held <= 0.4 * real * 1.03 + 2 * NEW_TOKENS * token_bytes(wide)


def test_the_report_agrees_with_the_storages(wide):
    inputs = wide.inputs(PROMPT)
    with vl_cache(wide.model, budget=0.1) as session:
        cache = session.new_cache(max_new_tokens=NEW_TOKENS)
        with torch.no_grad():
            wide.model(**inputs, cache=cache)
        report = session.report()
    reserve = NEW_TOKENS * token_bytes(wide)
    assert report.bytes_before == inputs["input_ids"].shape[1] * token_bytes(wide)
    assert report.bytes_after == pytest.approx(0.1 * report.bytes_before, rel=0.01)
    held = storage_bytes(tensors_of(cache))
    assert held == pytest.approx(report.bytes_after + reserve, rel=0.03)


def test_nothing_is_left_after_the_session(wide):
    inputs = wide.inputs(PROMPT)
    arguments = dict(max_new_tokens=NEW_TOKENS, do_sample=False)
    with vl_cache(wide.model, budget=0.4):
        wide.model.generate(**inputs, **arguments)
    before = storage_bytes(all_tensors())
    with vl_cache(wide.model, budget=0.4):
        wide.model.generate(**inputs, **arguments)
    assert storage_bytes(all_tensors()) - before < 0.02 * 527 * token_bytes(wide)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_the_block_gives_its_memory_back(wide, cuda_graph):
    """To whoever still holds the session, its report is left."""
    inputs = wide.inputs(PROMPT)
    arguments = dict(max_new_tokens=NEW_TOKENS, do_sample=False)
    with vl_cache(wide.model, budget=0.4, cuda_graph=cuda_graph):
        wide.model.generate(**inputs, **arguments)
    before = storage_bytes(all_tensors())
    with vl_cache(wide.model, budget=0.4, cuda_graph=cuda_graph) as session:
        wide.model.generate(**inputs, **arguments)
        report = session.report()
    assert session.cache is None and session.report() == report is not None
    assert storage_bytes(all_tensors()) - before < 0.02 * 527 * token_bytes(wide)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_device_gets_its_memory_back(backend):
    """As the allocator counts it, after the prefill of 4,096 tokens."""
    family = build("llava", head_dim=128, max_position_embeddings=8192)
    model = family.model.to("cuda", torch.float16)
    prompt = [1, *[5 + i % 90 for i in range(4000)], PICTURE, *range(7, 17)]
    inputs = {
        k: v.to("cuda", torch.float16) if v.is_floating_point() else v.to("cuda")
        for k, v in family.inputs(prompt).items()
    }
    full = inputs["input_ids"].shape[1] * 4 * 2 * 2 * 128 * 2
    choices = dict(budget=0.1, backend=backend, cuda_graph=False)
    with vl_cache(model, **choices) as session:
        prefill(session, inputs, model)
    del session
    gc.collect()
    before = torch.cuda.memory_allocated()
    with vl_cache(model, **choices) as session:
        cache = prefill(session, inputs, model)
        gc.collect()
        grown = torch.cuda.memory_allocated() - before
    reserve = NEW_TOKENS * 4 * 2 * 2 * 128 * 2
    assert cache.is_compressed
    assert 0.09 * full <= grown <= 0.105 * full + reserve
