"""What calibration measures is what the stock model loses, with one head's tokens masked."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from families import LONG

from vlcache_triton import VLCacheConfig
from vlcache_triton.apps.evaluation import Query, Variant
from vlcache_triton.apps.evaluation.calibrate import calibrate, head_losses
from vlcache_triton.integrations.transformers import VLCache, vl_cache
from vlcache_triton.integrations.transformers.names import CACHE
from vlcache_triton.recipe.policies import calibrated

LEVELS = (0.1, 0.3)
LATER_TURN = torch.tensor([30, 31, 32])


def expected_loss(family, inputs, continuation, answer, kept):
    """Of a token of the answer, by the stock model; `kept` masks the prompt after its prefill."""
    ids = torch.tensor([[*continuation.tolist(), *answer[:-1]]])
    wanted = torch.tensor(answer if len(continuation) else answer[1:])
    with oracle.evicted(family, kept), torch.no_grad():
        cache = family.model(**inputs, use_cache=True)[CACHE]
        mask = torch.ones(1, inputs["input_ids"].shape[1] + ids.shape[1])
        out = family.model(input_ids=ids, attention_mask=mask, **{CACHE: cache})
    return float(F.cross_entropy(out.logits[0, -len(wanted) :].double(), wanted))


@pytest.mark.parametrize("continuation", [torch.tensor([]).long(), LATER_TURN], ids=["", "turns"])
@pytest.mark.parametrize("remainder", ["none", "mean"])
def test_the_loss_is_that_of_one_head_masked(family, continuation, remainder):
    inputs = family.inputs(LONG)
    config = VLCacheConfig(budget=0.5, remainder=remainder)
    query = Query(inputs, continuation)
    losses, made_for = head_losses(family.model, query, 5, Variant("paper", config), LEVELS)
    assert made_for == VLCache(family.model.config).made_for

    length = inputs["input_ids"].shape[1]
    whole = oracle.kept_tokens(family, inputs, VLCacheConfig(budget=1.0))
    assert losses.shape == (len(whole), whole[0].shape[1], len(LEVELS))
    with torch.no_grad():
        ids = torch.cat([inputs["input_ids"], continuation[None]], 1)
        given = inputs | dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        answer = family.model.generate(**given, max_new_tokens=5, do_sample=False)
    answer = answer[0, ids.shape[1] :].tolist()
    base = expected_loss(family, inputs, continuation, answer, whole)
    maps = oracle.attention_maps(family, inputs)
    rows = oracle.query_rows(family, inputs, 0, config)
    for layer, head, j in [(0, 0, 0), (1, 1, 1), (len(whole) - 1, 0, 1)]:
        kept = oracle.kept_tokens(family, inputs, VLCacheConfig(budget=1.0))
        budget = round(LEVELS[j] * length)
        if remainder == "mean":
            kept.rows[layer][0, head] = True
            budget -= 1
        attention = maps[layer][0][:, rows].double()
        top = oracle.top_tokens(attention, budget, kept[layer].shape[1], config)
        kept[layer][0, head] = top[head]
        loss = expected_loss(family, inputs, continuation, answer, kept) - base
        assert losses[layer, head, j] == pytest.approx(loss, abs=1e-4)
    assert losses.abs().max() > 1e-2


def test_a_profile_is_for_its_model_alone(family):
    """And there it says what every head keeps."""
    inputs = family.inputs(LONG)
    variant = Variant("paper", VLCacheConfig(budget=0.3))
    queries = [(Query(inputs, LATER_TURN[:1]), 3)]
    profile = calibrate(family.model, queries, variant, "numbers", LEVELS)
    assert (profile.data, profile.ranked_by, profile.num_prompts) == ("numbers", "paper", 1)
    policy = calibrated(profile)
    with vl_cache(family.model, budget=0.3, policy=policy) as session:
        family.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        head_keep = session.cache.plan.head_keep[:, 0]
    length = inputs["input_ids"].shape[1]
    assert int(head_keep.sum()) == round(0.3 * len(head_keep) * length) * head_keep.shape[1]
    assert head_keep.unique().numel() > 1
    before = family.text_config.num_attention_heads
    family.text_config.num_attention_heads = 1 + before  # another model, of the same weights
    try:
        for refused in (
            lambda: vl_cache(family.model, budget=0.3, policy=policy).__enter__(),
            lambda: VLCache(family.model.config, policy=policy),
        ):
            with pytest.raises(ValueError, match="policy: got one made for llava"):
                refused()
    finally:
        family.text_config.num_attention_heads = before
