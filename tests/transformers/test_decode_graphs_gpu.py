"""Real captures, every family: the eager path's tokens and logits, by both loops."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from checks import GREEDY, logits
from families import LONG, SHORT, SUPPORTED

from vlcache_triton.integrations.transformers import vl_cache

ATOL = 1e-3
TOKENS = dict(max_new_tokens=8, do_sample=False)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize("family", SUPPORTED, indirect=True),
    pytest.mark.parametrize("budget", [0.4, 1.0]),
]


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.to("cuda") for name, x in inputs.items()}


def test_replays_equal_the_eager_path(family, budget) -> None:
    """The second prompt of a bucket is replayed from its first step on."""
    model = copy.deepcopy(family.model).to("cuda")
    prompts = [
        on_gpu(family.inputs(LONG, SHORT)),
        on_gpu(family.inputs([*LONG[:-1], 30], SHORT, seed=1)),
    ]
    with vl_cache(model, budget=budget, cuda_graph=False):
        expected = [model.generate(**inputs, **GREEDY) for inputs in prompts]
    with warnings.catch_warnings(), vl_cache(model, budget=budget) as session:
        warnings.filterwarnings("error", message="cuda_graph")
        for inputs, run in zip(prompts, expected, strict=True):
            out = model.generate(**inputs, **GREEDY)
            assert torch.equal(out.sequences, run.sequences)
            torch.testing.assert_close(logits(out), logits(run), atol=ATOL, rtol=0)
            del out  # holds the cache, whose memory and steps the next prompt is to take over
        assert session.graphs.num_captures == 1


def test_the_lean_loop_replays_the_same(family, budget) -> None:
    model = copy.deepcopy(family.model).to("cuda")
    inputs = on_gpu(family.inputs(LONG, SHORT))
    with vl_cache(model, budget=budget, cuda_graph=False):
        expected = model.generate(**inputs, **TOKENS)
    with warnings.catch_warnings(), vl_cache(model, budget=budget) as session:
        warnings.filterwarnings("error", message="cuda_graph")
        for _ in range(2):
            assert torch.equal(session.generate(**inputs, **TOKENS), expected)
        assert session.graphs.num_captures == 1
