"""Tensor parallelism, on two ranks of the CPU engine over gloo: the tokens of one rank."""

import json
from dataclasses import asdict

import pytest
from engine import TUNED, ask, expected_tokens, run_engine
from tiny_checkpoints import save_qwen2_5_vl

from vlcache_triton.recipe.config import VLCacheConfig

NAME = "qwen2_5_vl"


@pytest.mark.parametrize(
    "num_kv_heads, config",
    [
        (2, VLCacheConfig(budget=0.25)),
        (1, VLCacheConfig(budget=0.25)),
        (2, VLCacheConfig(budget=0.25, granularity="layer")),
        (1, TUNED),
    ],
)
def test_two_ranks_give_the_tokens_of_one(tmp_path, num_kv_heads, config):
    """A KV head a rank; one that both hold; one set of tokens for the heads of both; and maxima
    over the heads of both, with a row for what is evicted."""
    save_qwen2_5_vl(tmp_path / "model", num_key_value_heads=num_kv_heads)
    requests = [
        ask(NAME, "a prompt without any image", 0, 6),
        ask(NAME, "what is it?", 1, 6, seed=1),
        ask(NAME, "what is the difference between these?", 2, 6, seed=2),
    ]
    run = run_engine(
        tmp_path,
        [{"requests": requests}, {"flush": True}],
        {
            "VLCACHE_CONFIG": json.dumps(asdict(config)),
            "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
        },
        tp_size=2,
        chunked_prefill_size=64,
    )
    expected = [expected_tokens(tmp_path, request, **asdict(config)) for request in requests]
    assert run.tokens() == expected
    assert expected[1:] != [expected_tokens(tmp_path, request, None) for request in requests[1:]]
    assert run.steps[1] is True
