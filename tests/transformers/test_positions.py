"""`session.generate` goes on from the positions that the prompt was read with."""

from __future__ import annotations

import oracle
import pytest
import torch
import transformers
import unusual_models
from checks import GREEDY
from families import LONG, SHORT

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.names import CACHE

LEAN = dict(max_new_tokens=8, do_sample=False)


@pytest.fixture(scope="module")
def family():
    """Its text model counts pads, whatever positions `generate` has found."""
    if not hasattr(transformers, "HyperCLOVAXVisionV2Config"):
        pytest.skip("Transformers before 5.23 has no such model")
    return unusual_models.hyperclovax()


@pytest.mark.parametrize("prompts", [[LONG], [LONG, SHORT]], ids=["one", "padded"])
@pytest.mark.parametrize("budget", [0.4, 1.0])
def test_a_model_that_counts_for_itself(family, prompts, budget):
    inputs = family.inputs(*prompts)
    config = VLCacheConfig(budget=budget)
    with oracle.evicted(family, oracle.kept_tokens(family, inputs, config)):
        expected = family.model.generate(**inputs, **GREEDY).sequences
    with vl_cache(family.model, config) as session:
        assert torch.equal(session.generate(**inputs, **LEAN), expected)
        assert torch.equal(family.model.generate(**inputs, **LEAN), expected)


def test_a_second_turn_of_such_a_model(family):
    inputs = family.inputs(LONG, SHORT)
    turn = torch.tensor([[30, 31, 32]] * 2)
    runs = []
    with vl_cache(family.model, budget=0.4) as session:
        for generate in (family.model.generate, session.generate):
            first = generate(**inputs, **LEAN)
            ids = torch.cat([first, turn], 1)
            mask = torch.ones_like(ids)
            mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
            cache = session.cache
            runs.append(generate(input_ids=ids, attention_mask=mask, **{CACHE: cache}, **LEAN))
    assert torch.equal(*runs)
