"""Every policy decodes as the masked full cache does, whatever it keeps, heads apart or not."""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import GREEDY, ORACLE_ATOL, STOCK_ATOL, assert_same_run
from families import LONG, SHORT

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.recipe.policies import POLICIES, adakv, snapkv

CONFIG = VLCacheConfig(budget=0.4)


def kept_by(cache, inputs):
    """The plan of a cache as the oracle's masks."""
    starts = (inputs["attention_mask"] == 0).sum(1).tolist()
    num_seqs, width = inputs["input_ids"].shape
    plan = cache.plan
    kept = oracle.Kept(len(plan.head_keep), inputs["attention_mask"] == 1)
    for layer in range(len(kept)):
        mask = torch.zeros(num_seqs, cache.plan.num_kv_heads, width, dtype=torch.bool)
        for seq, start in enumerate(starts):
            for head, row in enumerate(cache.plan.kept_positions(layer, seq).tolist()):
                mask[seq, head, [start + j for j in row if j >= 0]] = True
        kept[layer] = mask
        kept.rows[layer] = plan.head_keep[layer] > mask.sum(-1)
    return kept


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("policy", POLICIES, ids=[p.name for p in POLICIES])
def test_a_policy_equals_the_masked_full_cache(family, policy):
    inputs = family.inputs(LONG, SHORT)
    with vl_cache(family.model, CONFIG, policy=policy) as session:
        out = family.model.generate(**inputs, **GREEDY)
    if policy.name == "full":
        assert session.report() is None
        expected = family.model.generate(**inputs, **GREEDY)
        assert_same_run(out, expected, STOCK_ATOL)
        return
    with oracle.evicted(family, kept_by(session.cache, inputs)):
        expected = family.model.generate(**inputs, **GREEDY)
    assert_same_run(out, expected, ORACLE_ATOL)
    total = sum(map(sum, session.report().kept))
    assert total == sum(round(0.4 * 4 * n) for n in inputs["attention_mask"].sum(1).tolist())


def test_heads_that_keep_different_counts(family):
    """Ada-KV without a window, so that there is something to share out on a short prompt."""
    inputs = family.inputs(LONG, SHORT)
    with vl_cache(family.model, CONFIG, policy=adakv(window=2, pool=1)) as session:
        out = family.model.generate(**inputs, **GREEDY)
    counts = session.cache.plan.head_keep
    assert (counts[..., 0] != counts[..., 1]).any()
    with oracle.evicted(family, kept_by(session.cache, inputs)):
        expected = family.model.generate(**inputs, **GREEDY)
    assert_same_run(out, expected, ORACLE_ATOL)


@pytest.mark.parametrize("policy", [snapkv(), adakv(window=2, pool=1)], ids=["snapkv", "adakv"])
def test_a_policy_with_a_row_for_the_rest(family, policy):
    inputs = family.inputs(LONG, SHORT)
    config = VLCacheConfig(budget=0.4, remainder="mean")
    with vl_cache(family.model, config, policy=policy) as session:
        out = family.model.generate(**inputs, **GREEDY)
    kept = kept_by(session.cache, inputs)
    assert all(rows.all() for rows in kept.rows)
    with oracle.evicted(family, kept):
        expected = family.model.generate(**inputs, **GREEDY)
    assert_same_run(out, expected, ORACLE_ATOL)
    total = sum(map(sum, session.report().kept))
    assert total == sum(round(0.4 * 4 * n) for n in inputs["attention_mask"].sum(1).tolist())


def test_another_policy_does_not_stream(family):
    with (
        pytest.raises(NotImplementedError, match="streaming: got True with the policy 'snapkv'"),
        vl_cache(family.model, CONFIG, policy=snapkv(), streaming=True),
    ):
        family.model.generate(**family.inputs(LONG), **GREEDY)
