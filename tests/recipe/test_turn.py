"""Later turns on a packed cache, against dense attention and lists, and a prompt's own way."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import REFERENCE, compress, make_layers, make_prompt, segment, top_positions
from torch import Tensor

from vlcache_triton import VLCacheConfig
from vlcache_triton.ops import get_backend
from vlcache_triton.pool.compress import PromptCompressor
from vlcache_triton.pool.ragged import RaggedCache
from vlcache_triton.recipe.budgets import layer_budgets, shrink
from vlcache_triton.recipe.policies import POLICIES, Policy
from vlcache_triton.recipe.prompt import Prompt
from vlcache_triton.recipe.softmax import Softmax
from vlcache_triton.recipe.turn import ROWS_AT_ONCE, TurnCompressor

SHARPNESS = [0.5, 4.0, 20.0]
SCALE = 8**-0.5


def append(ragged: RaggedCache, prompt: Prompt, layers) -> None:
    """The rows of a pass into all layers, as the adapter does it."""
    width = prompt.padded_length
    ragged.reserve(width)
    pads = torch.tensor(prompt.pads) if any(prompt.pads) else None
    for i, layer in enumerate(layers):
        k, v = (x.view(len(prompt.pads), width, *x.shape[1:]).transpose(1, 2) for x in layer[:2])
        ragged.append(i, k, v, pads)
    ragged.room -= width


def decide(ragged: RaggedCache, compressor: TurnCompressor, layers):
    for i, layer in enumerate(layers):
        bias = None if ragged.first_key_bias is None else ragged.first_key_bias[i]
        k, v = ragged.padded(i)
        compressor.add(layer.q, k, v, ragged.seqused_k[i], layer.softmax, bias)
    return compressor.decide(ragged.seqused_k.long(), ragged.num_evicted)


def first_prompt(config: VLCacheConfig, policy: Policy = POLICIES[0], **sizes):
    prompt = make_prompt([37, 24], [5, 4])
    compressor = PromptCompressor(prompt, 3, policy.configure(config), REFERENCE, policy)
    return compress(compressor, make_layers(prompt, SHARPNESS, **sizes))[1]


def mean_of(ragged: RaggedCache, layer: int, s: int) -> tuple[int, Tensor | None]:
    """How many tokens a segment's row stands for, and the row."""
    n = 0 if ragged.num_evicted is None else int(ragged.num_evicted[layer, s])
    return n, segment(ragged, layer, *divmod(s, ragged.num_kv_heads)) if n else None


@pytest.mark.parametrize(
    "choices",
    [
        {},
        dict(row_reduction="max"),
        dict(group_reduction="max", row_reduction="max", granularity="layer"),
        dict(smoothing=3, threshold=0.2),
        dict(remainder="mean", max_query_rows=3),
        dict(max_cache_tokens=5),
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [[40], [40, 23]], ids=["one", "padded"])
def test_a_whole_cache_is_compressed_as_one_prompt(choices, lengths):
    """The same tokens, whether its rows come dense or packed."""
    config = VLCacheConfig(budget=0.4, **choices)
    prompt = make_prompt(lengths, [config.max_query_rows or 7] * len(lengths))
    layers = make_layers(prompt, SHARPNESS)
    plan, expected = compress(PromptCompressor(prompt, 3, config, REFERENCE), layers)
    whole = VLCacheConfig(budget=1.0, remainder=config.remainder)
    _, ragged = compress(PromptCompressor(prompt, 3, whole, REFERENCE), layers)
    eviction = decide(ragged, TurnCompressor(prompt, config, REFERENCE), layers)
    torch.testing.assert_close(eviction.plan.sparsity, plan.sparsity)
    assert torch.equal(eviction.plan.head_keep, plan.head_keep)
    assert torch.equal(eviction.indices, plan.indices)
    out = ragged.evict(eviction, room=4)
    assert torch.equal(out.seqused_k, expected.seqused_k)
    for layer in range(3):
        for seq in range(len(lengths)):
            for head in range(2):
                for mine, its in zip(
                    segment(out, layer, seq, head),
                    segment(expected, layer, seq, head),
                    strict=True,
                ):
                    torch.testing.assert_close(mine, its)
    if expected.num_evicted is not None:
        assert torch.equal(out.num_evicted, expected.num_evicted)
        assert torch.equal(out.first_key_bias, expected.first_key_bias)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p.name != "full"], ids=lambda p: p.name)
def test_policies_rank_a_packed_prompt_as_a_dense_one(policy):
    prompt = make_prompt([40, 23], [7, 5])
    rows = tuple(
        policy.query_rows(n, length)
        for n, length in zip(prompt.query_rows, prompt.lengths, strict=True)
    )
    is_visual = torch.zeros(2, 40, dtype=torch.bool)
    is_visual[:, 20:30] = True
    prompt = dataclasses.replace(prompt, query_rows=rows, is_visual=is_visual)
    config = policy.configure(VLCacheConfig(budget=0.4))
    layers = make_layers(prompt, SHARPNESS)
    plan, _ = compress(PromptCompressor(prompt, 3, config, REFERENCE, policy), layers)
    _, ragged = compress(PromptCompressor(prompt, 3, VLCacheConfig(budget=1.0), REFERENCE), layers)
    eviction = decide(ragged, TurnCompressor(prompt, config, REFERENCE, policy), layers)
    assert torch.equal(eviction.plan.head_keep, plan.head_keep)
    assert torch.equal(eviction.indices, plan.indices)


@pytest.mark.parametrize(
    "softmax",
    [Softmax(SCALE, softcap=0.7), Softmax(SCALE, sinks=torch.tensor([2.0, -torch.inf, 0.5, 9.0]))],
    ids=["capped", "with sinks"],
)
def test_logits_become_weights_as_a_prompts_do(softmax):
    prompt, config = make_prompt([40, 23], [7, 7]), VLCacheConfig(budget=0.4)
    layers = make_layers(prompt, SHARPNESS)
    compressor = PromptCompressor(prompt, 3, config, REFERENCE)
    for layer in layers:
        compressor.add(*layer[:3], softmax)
    plan, _ = compressor.pack(4)
    _, ragged = compress(PromptCompressor(prompt, 3, VLCacheConfig(budget=1.0), REFERENCE), layers)
    turn = TurnCompressor(prompt, config, REFERENCE)
    for i, layer in enumerate(layers):
        turn.add(layer.q, *ragged.padded(i), ragged.seqused_k[i], softmax)
    eviction = turn.decide(ragged.seqused_k.long(), None)
    torch.testing.assert_close(eviction.plan.sparsity, plan.sparsity)
    assert torch.equal(eviction.indices, plan.indices)
    plain = decide(ragged, TurnCompressor(prompt, config, REFERENCE), layers)
    assert not torch.equal(plain.indices, plan.indices)


def dense_maps(ragged, layer: int, seq: int, head: int, q: Tensor, rows: int):
    """(`[group, rows, keys]` fp64 attention of the last rows over a segment, the greatest of a
    token in each row)."""
    k = segment(ragged, layer, seq, head)[0].double()
    q = q[q.shape[0] // 2 * head :][: q.shape[0] // 2, -rows:].double()
    logits = torch.einsum("hqd,kd->hqk", q, k) * SCALE
    keys = len(k)
    logits[:, torch.arange(keys) > torch.arange(keys - rows, keys)[:, None]] = -math.inf
    largest = logits.amax(-1, keepdim=True)
    if ragged.first_key_bias is not None:
        logits[..., 0] += ragged.first_key_bias[layer, seq * 2 + head].double()
    attention = logits.softmax(-1)
    passes = (segment_logits(q, k) - largest >= math.log(0.01)) & (attention > 0)
    return attention, passes


def segment_logits(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("hqd,kd->hqk", q, k) * SCALE


@pytest.mark.parametrize("remainder", ["none", "mean"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_turn_behind_what_was_kept(remainder, backend):
    """Two prompts, then a turn of unequal lengths, one of which has no image, entry by entry."""
    config = VLCacheConfig(budget=0.4, remainder=remainder)
    ragged = first_prompt(config)
    ragged.backend = get_backend(backend, ragged.k.device)
    turn = make_prompt([21, 13], [6, 0])
    layers = make_layers(turn, SHARPNESS, seed=1)
    before = [
        [[x.clone() for x in segment(ragged, layer, *divmod(s, 2))] for s in range(4)]
        for layer in range(3)
    ]
    means = [[mean_of(ragged, layer, s)[0] for s in range(4)] for layer in range(3)]
    append(ragged, turn, layers)
    expected, densities = [], []
    for i, layer in enumerate(layers):
        passes, heads = 0, []
        for head in range(2):
            attention, passed = dense_maps(ragged, i, 0, head, layer.q[0], 6)
            passes += int(passed[..., -21:].sum())
            heads.append(attention[..., -21:])
        densities.append(passes / (4 * sum(21 - i for i in range(6))))
        expected.append(torch.cat(heads))
    density = torch.tensor(densities, dtype=torch.float64)[:, None]
    keep = layer_budgets(density, torch.tensor([21]), config)[:, 0].tolist()
    assert sum(keep) == round(0.4 * 21 * 3)

    eviction = decide(ragged, TurnCompressor(turn, config, ragged.backend), layers)
    out = ragged.evict(eviction, room=8)
    assert out.room == 8
    torch.testing.assert_close(eviction.plan.sparsity[:, 0], 1 - density[:, 0])
    assert eviction.plan.sparsity[:, 1].isnan().all()
    for i, layer in enumerate(layers):
        k, v = (x.view(2, 21, 2, -1) for x in layer[:2])
        for s in range(4):
            seq, head = divmod(s, 2)
            live = segment(out, i, seq, head)
            if seq == 1:
                for mine, old, new in zip(live, before[i][s], (k, v), strict=True):
                    torch.testing.assert_close(mine, torch.cat([old, new[1, -13:, head]]))
                continue
            has_row = means[i][s] > 0
            assert has_row == (remainder == "mean")
            top = top_positions(expected[i], keep[i], 2, config)[head]
            gone = [j for j in range(21) if j not in top]
            for mine, old, new in zip(live, before[i][s], (k, v), strict=True):
                new = new[0, :, head]
                rows = torch.cat([old, new[top]])
                assert len(mine) == len(rows) == len(old) + keep[i]
                if has_row:
                    n = means[i][s]
                    rows[0] = (old[0] * n + new[gone].sum(0)) / (n + len(gone))
                    assert int(out.num_evicted[i, s]) == n + len(gone)
                    assert out.first_key_bias[i, s].exp() == pytest.approx(n + len(gone))
                torch.testing.assert_close(mine, rows)


def test_a_row_for_the_evicted_where_there_was_none():
    """A sequence that was left whole gets one in front of its tokens, paid from the turn's."""
    config = VLCacheConfig(budget=0.4, remainder="mean")
    prompt = make_prompt([12, 9], [0, 3])
    compressor = PromptCompressor(prompt, 3, config, REFERENCE)
    _, ragged = compress(compressor, make_layers(prompt, SHARPNESS))
    assert not ragged.num_evicted[:, :2].any() and ragged.num_evicted[:2, 2:].all()
    before = [segment(ragged, layer, 0, 0)[0].clone() for layer in range(3)]
    turn = make_prompt([20, 20], [4, 4])
    layers = make_layers(turn, SHARPNESS, seed=1)
    append(ragged, turn, layers)
    eviction = decide(ragged, TurnCompressor(turn, config, REFERENCE), layers)
    out = ragged.evict(eviction, room=0)
    for layer in range(3):
        keep = int(eviction.plan.head_keep[layer, 0, 0])
        tokens = eviction.plan.kept_positions(layer, 0)[0].long()
        if keep in (1, 20):  # nothing but a token, or nothing to stand for
            continue
        assert len(tokens) == keep - 1
        k = layers[layer].k.view(2, 20, 2, -1)[0, :, 0]
        gone = torch.ones(20, dtype=torch.bool)
        gone[tokens] = False
        rows = torch.cat([k[gone].mean(0, keepdim=True), before[layer], k[tokens]])
        torch.testing.assert_close(segment(out, layer, 0, 0)[0], rows)
        assert out.num_evicted[layer, 0] == 20 - len(tokens)


@pytest.mark.parametrize("remainder", ["none", "mean"])
@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
def test_a_bound_takes_the_least_attended_of_all(remainder, granularity):
    config = VLCacheConfig(
        budget=0.4, remainder=remainder, granularity=granularity, max_cache_tokens=16
    )
    ragged = first_prompt(config)
    assert ragged.seqused_k.view(3, 2, 2)[..., 0].sum(0).tolist() == [round(0.4 * 37 * 3), 29]
    turn = make_prompt([21, 13], [6, 5])
    layers = make_layers(turn, SHARPNESS, seed=1)
    append(ragged, turn, layers)
    unbound = dataclasses.replace(config, max_cache_tokens=None)
    free = ragged.evict(decide(ragged, TurnCompressor(turn, unbound, REFERENCE), layers), 0)
    eviction = decide(ragged, TurnCompressor(turn, config, REFERENCE), layers)
    out = ragged.evict(eviction, 0)
    rows, before = (x.seqused_k.view(3, 2, 2)[..., 0] for x in (out, free))
    assert before.sum(0).tolist() == [44 + 25, 29 + 16]
    assert rows.sum(0).tolist() == [48, 45]
    assert (rows <= before).all() and (rows[:, 0] >= before[:, 0] * 48 // 69).all()
    for i in range(3):
        for s in (0, 1):
            kept, free_rows = (segment(x, i, 0, s)[0] for x in (out, free))
            first = int(remainder == "mean")
            found = [int((free_rows == row).all(1).nonzero()[0]) for row in kept[first:]]
            assert found == sorted(found) and min(found) >= first
            assert torch.equal(kept[-1], free_rows[-1])
            maps = [dense_maps(ragged, i, 0, h, layers[i].q[0], 6)[0] for h in (0, 1)]
            score = (maps[s].sum(1) / 2).sum(0)
            if granularity == "layer":
                score = (maps[0].sum((0, 1)) + maps[1].sum((0, 1))) / 4
            live = segment(ragged, i, 0, s)[0]
            of = [int((live == row).all(1).nonzero()[0]) for row in free_rows[first:]]
            scores = dict(zip(range(first, len(free_rows)), score[of].tolist(), strict=True))
            recent = max(1, math.floor(0.1 * len(found) + 0.5))
            lost = [scores[j] for j in scores if j not in found]
            chosen = [scores[j] for j in found[:-recent]]
            assert min(chosen, default=1.0) >= max(lost, default=0.0) - 1e-6
            if remainder == "mean":
                total = 37 + 21
                assert int(out.num_evicted[i, s]) + len(found) == total
    if granularity == "layer":
        assert torch.equal(eviction.tokens[:, 0], eviction.tokens[:, 1])


def test_a_turn_of_text_is_kept_but_for_the_bound():
    config = VLCacheConfig(budget=0.4, max_cache_tokens=20)
    ragged = first_prompt(config)
    turn = make_prompt([11, 11], [0, 0])
    layers = make_layers(turn, SHARPNESS, seed=1)
    append(ragged, turn, layers)
    eviction = decide(ragged, TurnCompressor(turn, config, REFERENCE), layers)
    assert eviction.plan is None
    rows = ragged.evict(eviction, 0).seqused_k.view(3, 2, 2)[..., 0].sum(0)
    assert rows.tolist() == [60, 60]


def test_more_rows_than_are_measured_at_once(monkeypatch):
    config = VLCacheConfig(budget=0.4, row_reduction="max")
    turn = make_prompt([30, 26], [19, 22])
    layers = make_layers(turn, SHARPNESS, seed=1)
    evictions = []
    for rows in (ROWS_AT_ONCE, 7):
        monkeypatch.setattr("vlcache_triton.recipe.turn.ROWS_AT_ONCE", rows)
        ragged = first_prompt(config)
        append(ragged, turn, layers)
        evictions.append(decide(ragged, TurnCompressor(turn, config, REFERENCE), layers))
    assert torch.equal(evictions[0].indices, evictions[1].indices)
    torch.testing.assert_close(evictions[0].plan.sparsity, evictions[1].plan.sparsity)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    share=st.floats(0, 1),
    least=st.integers(1, 2),
)
def test_rows_are_made_fewer_in_proportion(rows, share, least):
    lower = [min(n, least) for n in rows]
    total = round(sum(lower) + share * (sum(rows) - sum(lower)))
    keep = shrink(torch.tensor(rows)[:, None], torch.tensor([total]), least)[:, 0].tolist()
    assert sum(keep) == total
    assert all(a <= n <= b for a, n, b in zip(lower, keep, rows, strict=True))
    for a, x in zip(rows, keep, strict=True):
        for b, y in zip(rows, keep, strict=True):
            assert a < b or x >= y - 1
