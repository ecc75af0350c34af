"""Policies that look at keys and values, against what their published code computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from prompts import make_layers
from ranked import CONFIG, KEEP, LENGTH, SHARPNESS, best, column_sums, kept, run, smoothed

from vlcache_triton import VLCacheConfig
from vlcache_triton.recipe.policies import keydiff, mixkv, outside_scores, query_agnostic


def test_keydiff_keeps_the_keys_that_are_least_like_the_others():
    """As kvpress has it: the anchor is the mean of unit keys."""
    plan, _, layers = run(keydiff())
    assert plan.prompt.query_rows == (1,)
    for i, layer in enumerate(layers):
        keys = layer.k.double().transpose(0, 1)  # [num_kv_heads, length, d]
        anchor = F.normalize(keys, dim=-1).mean(1, keepdim=True)
        scores = -F.cosine_similarity(keys, anchor, dim=-1)
        for head, row in enumerate(scores.tolist()):
            assert kept(plan, i, head) == best(row, KEEP - 1, 0, LENGTH - 1)


@pytest.mark.parametrize(("window", "pool"), [(6, 1), (9, 5)])
def test_mixkv_mixes_importance_and_diversity(window, pool):
    """As `headwisemixkv` of its code, with the similarity that it computes of the prompt."""
    policy = mixkv(window, pool)
    prompt = run(policy)[0].prompt
    layers = make_layers(prompt, SHARPNESS)
    for layer in layers:  # keys that are alike, the more so in the second head
        layer.k[:] += torch.tensor([0.5, 2.0])[:, None]
    plan, _, _ = run(policy, layers=layers)
    alike = []
    for i, layer in enumerate(layers):
        attention = smoothed(column_sums(layer, plan.prompt) / window, pool)
        for head in range(2):
            keys, values = layer.k[:, head].double(), layer.v[:, head].double()
            before = LENGTH - window
            attn = torch.tensor(attention[head], dtype=torch.float64)[:before]
            unit = keys / keys.norm(dim=-1, keepdim=True)
            mean = unit.sum(0) / LENGTH
            unlike = -(unit[:before] @ mean)
            unlike = (unlike - unlike.min()) / (unlike.max() - unlike.min())
            unlike = unlike * attn.mean() / unlike.mean()
            norms = values[:before].norm(dim=-1)
            norms = (norms - norms.min()) / (norms.max() - norms.min())
            norms = norms * attn.mean() / norms.mean()
            s = (LENGTH * mean.square().sum() - 1) / (LENGTH - 1)
            alike.append(float(s))
            score = s * unlike + (1 - s) * (attn + norms)
            row = [*score.tolist(), *[0.0] * window]
            assert kept(plan, i, head) == best(row, KEEP - window, 0, before)
    assert max(alike) > 0.7 and min(alike) < 0.3


def test_query_agnostic_is_keydiff_with_a_row_for_the_rest():
    plan, _, layers = run(query_agnostic())
    assert plan.evicted.unique().tolist() == [LENGTH - KEEP + 1]
    fewer = run(keydiff(), VLCacheConfig(budget=KEEP - 1), layers=layers)[0]
    assert torch.equal(plan.indices, fewer.indices)


def test_scores_from_outside_rank():
    """Called for each layer and prompt, without pads, once."""
    asked = []

    def gate(layer, keys, values):
        asked.append((layer, tuple(keys.shape), tuple(values.shape)))
        return (keys * values).sum(-1).T

    policy = outside_scores(gate, "gate", allocation="uniform", recent_fraction=0.0)
    plan, _, layers = run(policy)
    assert policy.name == "gate"
    assert asked == [(i, (LENGTH, 2, 8), (LENGTH, 2, 8)) for i in range(len(layers))]
    for i, layer in enumerate(layers):
        for head, row in enumerate((layer.k * layer.v).sum(-1).T.tolist()):
            assert kept(plan, i, head) == best(row, KEEP - 1, 0, LENGTH - 1)
    asked.clear()
    run(policy, lengths=(LENGTH, 31), rows=(12, 5))
    assert [(i, shape[0]) for i, shape, _ in asked] == [
        (i, n) for i in range(len(layers)) for n in (LENGTH, 31)
    ]


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, LENGTH - 1), torch.zeros(LENGTH, 2), torch.full((2, LENGTH), torch.nan)],
)
def test_scores_from_outside_are_checked(wrong):
    with pytest.raises(ValueError, match=r"^outside: got .*expected .*\(2, 60\)"):
        run(outside_scores(lambda layer, keys, values: wrong), CONFIG)
