"""The way of a prompt: layers go in, the rows that the plan names come out, and nothing else."""

import dataclasses
import json
import math

import pytest
import torch
from prompts import (
    REFERENCE,
    attention,
    compress,
    make_layers,
    make_prompt,
    segment,
    sparsity,
    top_positions,
)

from vlcache_triton import VLCacheConfig, layer_budgets
from vlcache_triton.ops import get_backend
from vlcache_triton.pool.compress import PromptCompressor
from vlcache_triton.pool.ragged import RaggedCache
from vlcache_triton.pool.streaming import StreamingCompressor
from vlcache_triton.recipe.report import CompressionReport
from vlcache_triton.recipe.softmax import Softmax

SHARPNESS = [0.3, 2.0, 8.0]
either = pytest.mark.parametrize("make", [PromptCompressor, StreamingCompressor])


def assert_pools_hold(ragged, layers, prompt, positions):
    """positions(layer, seq) -> the kept positions of each KV head."""
    for row, layer in enumerate(layers):
        for seq, span in enumerate(prompt.spans):
            for head, kept in enumerate(positions(row, seq)):
                k, v = segment(ragged, row, seq, head)
                assert torch.equal(k, layer.k[span, head][kept])
                assert torch.equal(v, layer.v[span, head][kept])


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rows_of_the_plan_are_packed(make, dtype):
    prompt = make_prompt([40, 23], [6, 3])
    layers = make_layers(prompt, SHARPNESS, d_v=12, dtype=dtype)
    plan, ragged = compress(make(prompt, 3, VLCacheConfig(budget=0.3), REFERENCE), layers)
    assert plan.keep.sum(0).tolist() == [round(0.3 * 3 * 40), round(0.3 * 3 * 23)]
    assert torch.equal(ragged.seqused_k.long(), plan.head_keep.flatten(1))
    assert ragged.k.dtype == ragged.v.dtype == dtype
    assert_pools_hold(ragged, layers, prompt, plan.kept_positions)


@either
@pytest.mark.parametrize("row_reduction", ["sum", "max"])
@pytest.mark.parametrize("group_reduction", ["mean", "max"])
def test_the_way_as_a_whole_is_the_recipe(make, row_reduction, group_reduction):
    """Not by way of the plan: from attention maps to the rows of the pools."""
    prompt = make_prompt([48], [7])
    layers = make_layers(prompt, SHARPNESS)
    config = VLCacheConfig(
        budget=0.25, row_reduction=row_reduction, group_reduction=group_reduction
    )
    _, ragged = compress(make(prompt, 3, config, REFERENCE), layers)
    maps = [attention(prompt, layer, 0) for layer in layers]
    gamma = torch.tensor([[sparsity(x, 0.01)] for x in maps], dtype=torch.float64)
    keep = layer_budgets(1 - gamma, torch.tensor([48]), config).flatten().tolist()
    kept = [top_positions(x, n, 2, config) for x, n in zip(maps, keep, strict=True)]
    assert_pools_hold(ragged, layers, prompt, lambda layer, seq: kept[layer])


@either
@pytest.mark.parametrize("budget", [0.02, 0.3, 0.97, 2, 30])
def test_a_row_stands_for_what_is_evicted(make, budget):
    """The first of a segment: the mean of what is not among the others, and how many that are."""
    prompt = make_prompt([40, 23], [6, 3])
    layers = make_layers(prompt, SHARPNESS, d_v=12)
    config = VLCacheConfig(budget=budget, remainder="mean", min_layer_budget=0.0)
    plan, ragged = compress(make(prompt, 3, config, REFERENCE), layers)
    without = VLCacheConfig(budget=budget, min_layer_budget=0.0)
    assert torch.equal(plan.keep, compress(make(prompt, 3, without, REFERENCE), layers)[0].keep)
    has_row = (plan.head_keep > 1) & (plan.head_keep < torch.tensor([40, 23])[:, None])
    assert torch.equal(plan.evicted > 0, has_row)
    for row, layer in enumerate(layers):
        for seq, span in enumerate(prompt.spans):
            for head, kept in enumerate(plan.kept_positions(row, seq).tolist()):
                dense_k, dense_v = layer.k[span, head], layer.v[span, head]
                k, v = segment(ragged, row, seq, head)
                bias = ragged.first_key_bias[row, seq * 2 + head]
                evicted = [j for j in range(len(dense_k)) if j not in kept]
                if has_row[row, seq, head]:
                    assert plan.evicted[row, seq, head] == len(evicted)
                    torch.testing.assert_close(k[0], dense_k[evicted].mean(0))
                    torch.testing.assert_close(v[0], dense_v[evicted].mean(0))
                    torch.testing.assert_close(bias, torch.tensor(math.log(len(evicted))))
                    k, v = k[1:], v[1:]
                else:
                    assert bias == 0
                assert torch.equal(k, dense_k[kept]) and torch.equal(v, dense_v[kept])


@either
@pytest.mark.parametrize("head_room", [1, 5])
def test_memory_is_what_is_kept_and_the_head_room(make, head_room):
    prompt = make_prompt([40, 23], [6, 3])
    layers = make_layers(prompt, SHARPNESS)
    compressor = make(prompt, 3, VLCacheConfig(budget=0.3), REFERENCE)
    plan, ragged = compress(compressor, layers, head_room)
    rows = 2 * int(plan.keep.sum()) + head_room * 3 * 2 * 2
    assert ragged.nbytes == rows * (8 + 8) * 4
    assert ragged.room == head_room
    assert ragged.max_seqlen_k == int(plan.keep.max()) + head_room
    assert torch.equal(ragged.cu_seqlens_k.diff(), ragged.seqused_k + head_room)
    assert compressor.bytes_seen == sum(x.k.nbytes + x.v.nbytes for x in layers)
    assert compressor.num_added == 3


@either
@pytest.mark.parametrize(
    ("query_rows", "budget"), [([6, 3], 1.0), ([0, 0], 0.1)], ids=["lossless", "no image"]
)
def test_what_is_not_compressed_is_packed_whole(make, query_rows, budget):
    prompt = make_prompt([40, 23], query_rows)
    layers = make_layers(prompt, SHARPNESS)
    compressor = make(prompt, 3, VLCacheConfig(budget=budget), REFERENCE)
    assert not compressor.compresses
    plan, ragged = compress(compressor, layers)
    assert plan.keep.tolist() == [[40, 23]] * 3
    assert plan.sparsity.isnan().all()
    assert_pools_hold(ragged, layers, prompt, lambda layer, seq: [range(prompt.lengths[seq])] * 2)


@either
def test_one_of_a_batch_may_be_left_whole(make):
    prompt = make_prompt([40, 23], [0, 3])
    layers = make_layers(prompt, SHARPNESS)
    plan, ragged = compress(make(prompt, 3, VLCacheConfig(budget=0.3), REFERENCE), layers)
    assert plan.keep[:, 0].tolist() == [40] * 3
    assert plan.keep[:, 1].sum() == round(0.3 * 3 * 23)
    assert plan.kept_positions(0, 0).tolist() == [list(range(40))] * 2
    assert_pools_hold(ragged, layers, prompt, plan.kept_positions)


@either
@pytest.mark.parametrize("compressible", [True, False])
def test_a_cache_may_be_lent(make, compressible):
    """A lent cache is larger than needed; it is asked for as RaggedCache is."""
    lent = []

    def allocate(shape, backend):
        sizes = dict(capacity=shape.capacity + 100, max_seqlen_k=shape.max_seqlen_k + 50)
        lent.append(RaggedCache(dataclasses.replace(shape, **sizes), backend))
        return lent[-1]

    prompt = make_prompt([40, 23], [6, 3] if compressible else [0, 0])
    layers = make_layers(prompt, SHARPNESS)
    compressor = make(prompt, 3, VLCacheConfig(budget=0.3), REFERENCE)
    for layer in layers:
        compressor.add(*layer)
    plan, ragged = compressor.pack(4, allocate)
    assert lent == [ragged]
    assert ragged.room == 4
    assert_pools_hold(ragged, layers, prompt, plan.kept_positions)


@either
def test_later_rows_of_q_are_all_that_is_needed(make):
    prompt = make_prompt([40, 23], [6, 3])
    layers = make_layers(prompt, SHARPNESS)
    config = VLCacheConfig(budget=0.3)
    expected, _ = compress(make(prompt, 3, config, REFERENCE), layers)
    cut = [layer._replace(q=layer.q[:, :, -6:]) for layer in layers]
    plan, _ = compress(make(prompt, 3, config, REFERENCE), cut)
    assert torch.equal(plan.indices, expected.indices)
    assert torch.equal(plan.cu_kept, expected.cu_kept)


@either
@pytest.mark.parametrize("remainder", ["none", "mean"])
def test_the_kernels_give_what_the_reference_gives(make, remainder):
    """On a GPU, or in Triton's interpreter: budgets, positions, rows, and a decode step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompt = make_prompt([40, 23], [6, 3])
    layers = make_layers(prompt, [2.0, 0.5], d=64, d_v=64)
    layers = [
        layer._replace(**{n: getattr(layer, n).to(device) for n in "kvq"}) for layer in layers
    ]
    config = VLCacheConfig(budget=0.3, remainder=remainder)
    step = [torch.randn(2, heads, 1, 64, device=device) for heads in (2, 2, 4)]
    outs = []
    for name in ("triton", "reference"):
        plan, ragged = compress(make(prompt, 2, config, get_backend(name, device)), layers)
        ragged.append(1, *step[:2])
        outs.append((plan, ragged.attend(1, step[2], Softmax(0.125)), segment(ragged, 1, 1, 0)))
    (plan, out, rows), (expected_plan, expected_out, expected_rows) = outs
    assert torch.equal(plan.head_keep, expected_plan.head_keep)
    assert torch.equal(plan.indices, expected_plan.indices)
    if remainder == "none":
        assert all(map(torch.equal, rows, expected_rows))
    torch.testing.assert_close(rows, expected_rows)
    torch.testing.assert_close(out, expected_out, atol=2e-5, rtol=0)


def test_a_report_is_plain_numbers():
    report = CompressionReport(
        budget=0.1,
        layers=[1, 3],
        sparsity=[[0.9, None], [0.8, None]],
        kept=[[4, 9], [2, 9]],
        lengths=[30, 9],
        bytes_before=960,
        bytes_after=384,
        bytes_allocated=512,
    )
    told = json.loads(json.dumps(report.to_dict()))
    assert told == report.to_dict()
    assert CompressionReport(**told) == report
    assert not any(isinstance(x, float) and math.isnan(x) for row in told["sparsity"] for x in row)
