"""Policies that share the budget out over heads and layers, against their published code."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from prompts import attention
from ranked import CONFIG, KEEP, LENGTH, best, column_sums, kept, run, smoothed
from torch import Tensor

from vlcache_triton.recipe.policies import Policy, defensivekv, sparsemm
from vlcache_triton.recipe.profile import HeadHits


def maxima(layer, prompt, window: int, pool: int) -> Tensor:
    """`[num_kv_heads, length]` of the published code's "Defensive Mechanism", for pool=1."""
    maps = attention(prompt, layer, 0).view(2, 2, window, LENGTH)
    scores = torch.tensor(smoothed(maps.amax(1).amax(1), pool))
    least = scores[:, : LENGTH - window].mean(-1, keepdim=True)
    return scores.clamp(min=least)


@pytest.mark.parametrize(("window", "pool"), [(6, 1), (4, 5)])
@pytest.mark.parametrize("across_layers", [False, True])
def test_defensivekv_shares_by_the_worst_case(window, pool, across_layers):
    plan, _, layers = run(defensivekv(window, pool, across_layers=across_layers))
    assert plan.prompt.query_rows == (window,)
    scores = torch.stack([maxima(layer, plan.prompt, window, pool) for layer in layers])
    scores[..., LENGTH - window :] = torch.inf
    num_kept = KEEP * 2 * (len(layers) if across_layers else 1)
    for some, counts in zip(
        scores.flatten(0, 1)[None] if across_layers else scores,
        plan.head_keep.flatten()[None] if across_layers else plan.head_keep.flatten(1),
        strict=True,
    ):
        head = some.flatten().topk(num_kept).indices // LENGTH
        expected = torch.bincount(head, minlength=len(some))
        ties = (some.flatten() == some.flatten().topk(num_kept).values[-1]).sum()
        assert int(counts.sum()) == num_kept
        assert int((counts - expected).abs().sum()) <= 2 * (int(ties) - 1)
    for i in range(len(layers)):
        for h in range(2):
            count = int(plan.head_keep[i, 0, h])
            expected_kept = best(scores[i, h].tolist(), count - window, 0, LENGTH - window)
            assert kept(plan, i, h) == expected_kept
    layers_keep = plan.head_keep.sum((1, 2))
    assert (layers_keep.unique().numel() > 1) == across_layers


HITS = HeadHits([[1.0, 2, 0, 1], [0, 0, 0, 0], [9, 30, 2, 2], [1, 1, 1, 1]])


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.6, 1.0])
def test_sparsemm_shares_by_hits(ratio):
    """min share + hits, as published; to which it is equal but for rounding, and exact in sum."""
    window = 4
    plan, _, layers = run(sparsemm(HITS, ratio, window, pool=3))
    base = KEEP - window
    least = int(base * ratio)
    share = torch.tensor(HITS.hits)
    share = (share / share.sum()).view(4, 2, 2).sum(-1)
    published = (share * (base - least) * 8 + least).round() + window
    counts = plan.head_keep[:, 0]
    assert int(counts.sum()) == KEEP * 8
    if published.max() <= LENGTH:
        assert (counts - published).abs().max() <= 1
    assert counts.min() >= least + window and counts.max() <= LENGTH
    for i, layer in enumerate(layers):
        for head, row in enumerate(smoothed(column_sums(layer, plan.prompt), 3)):
            count = int(counts[i, head])
            assert kept(plan, i, head) == best(row, count - window, 0, LENGTH - window)


def test_a_head_that_would_get_more_than_the_prompt_leaves_the_rest_to_others():
    hits = HeadHits([[1000.0, 1], [1, 1], [1, 1], [1, 1]])
    counts = run(sparsemm(hits, 0.0, window=2))[0].head_keep[:, 0]
    assert counts[0, 0] == LENGTH and int(counts.sum()) == KEEP * 8
    rest = counts.flatten()[1:]
    assert rest.max() - rest.min() <= 1


def test_a_budget_below_the_window_is_shared_evenly():
    plan = run(sparsemm(HITS, window=32))[0]
    assert plan.head_keep.unique().tolist() == [KEEP]


@pytest.mark.parametrize("hits", [HITS.hits[:3], [row[:3] for row in HITS.hits]])
def test_hits_of_another_model_are_refused(hits):
    with pytest.raises(ValueError, match=r"^profile: got one of [34] layers and [34] heads"):
        run(sparsemm(HeadHits(hits)))


def test_a_ratio_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"^ratio: got 1\.5"):
        sparsemm(HITS, ratio=1.5)


def test_any_shares_that_sum_exactly_are_kept():
    """Some heads nothing, some all; a padded batch, each prompt its own."""
    wanted = {
        LENGTH: torch.tensor([[60, 0], [1, 7], [30, 10], [2, 10]]),
        31: torch.tensor([[1, 5], [8, 31], [10, 1], [6, 0]]),
    }
    policy = Policy("as told", share_heads=lambda scores, stats, keep: wanted[scores.shape[-1]])
    config = dataclasses.replace(CONFIG, allocation="uniform")
    plan, ragged, _ = run(policy, config, lengths=(LENGTH, 31), rows=(12, 5))
    for seq, n in enumerate(wanted):
        assert torch.equal(plan.head_keep[:, seq], wanted[n])
    assert torch.equal(ragged.seqused_k.long(), plan.head_keep.flatten(1))
    assert len(plan.indices) == sum(int(x.sum()) for x in wanted.values())


@pytest.mark.parametrize(
    "shares",
    [
        torch.full((4, 2), KEEP + 1),
        torch.tensor([[61, 14], *[[15, 15]] * 2, [1, -1]]),
        torch.full((4, 1), 2 * KEEP),
    ],
    ids=["another sum", "more than the prompt", "another shape"],
)
def test_other_shares_are_refused(shares):
    policy = Policy("wrong", share_heads=lambda scores, stats, keep: shares)
    with pytest.raises(ValueError, match=r"share_heads: got .*expected"):
        run(policy, dataclasses.replace(CONFIG, allocation="uniform"))
