"""A thousand random requests: each answers as it would alone, and every slot comes back."""

import json
import random
from dataclasses import asdict

import pytest
from engine import TUNED, ask, expected_tokens, run_engine
from tiny_checkpoints import save_qwen2_5_vl

from vlcache_triton.recipe.config import VLCacheConfig

NAME = "qwen2_5_vl"
PAPER = VLCacheConfig(budget=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a tiny Qwen2.5-VL."""
    folder = tmp_path_factory.mktemp(NAME)
    save_qwen2_5_vl(folder / "model")
    return folder


def random_requests(count: int, rng: random.Random) -> list[dict]:
    """Of 1 to 200 tokens with 0 to 3 images; beginnings are shared, some are aborted on the way."""
    requests = []
    for _ in range(count):
        request = ask(
            NAME,
            "x" * rng.randint(1, 40),
            rng.choice([0, 1, 1, 2, 3]),
            rng.randint(1, 12),
            seed=rng.randrange(1000),
            before="the same beginning " * rng.randint(0, 4),
        )
        if rng.random() < 0.15:
            request["abort_after"] = rng.randint(1, request["max_new_tokens"])
        requests.append(request)
    return requests


def serve_random(folder, part: int, count: int, config: VLCacheConfig) -> tuple[int, int]:
    """(requests compared, of which whole), of a server that is drawn like its requests."""
    rng = random.Random(part)
    requests = random_requests(count, rng)
    waves = [{"requests": requests[i : i + 25]} for i in range(0, count, 25)]
    run = run_engine(
        folder,
        [*waves, {"flush": True}],
        {"VLCACHE_CONFIG": json.dumps(asdict(config))},
        seconds=900 + 30 * count,
        max_total_tokens=rng.randint(240, 420),
        chunked_prefill_size=rng.randint(37, 70),
        disable_radix_cache=part % 2 == 1,
        disable_overlap_schedule=part % 4 >= 2,
    )
    assert run.steps[-1] is True, "a slot or a request is left"
    results = [result for step in run.steps[:-1] for result in step]
    compared = whole = 0
    for request, result in zip(requests, results, strict=True):
        tokens = result["output_ids"]
        is_whole = result["finish"] != "abort"
        assert not is_whole or len(tokens) == request["max_new_tokens"]
        if result["retractions"] and request["images"]:
            continue  # the outputs it had given were prefilled again, over the whole prompt
        # One new token comes from the prefill alone, and nothing is compressed for it.
        expected = expected_tokens(folder, request, **asdict(config))
        assert tokens == expected[: len(tokens)], request
        compared, whole = compared + 1, whole + is_whole
    return compared, whole


def test_random_requests_answer_as_they_would_alone(folder):
    compared, whole = serve_random(folder, part=0, count=25, config=PAPER)
    assert compared > 20 and whole > 15


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, config", [*((i, PAPER) for i in range(10)), *((i, TUNED) for i in range(10, 14))]
)
def test_a_thousand_random_requests_answer_as_they_would_alone(folder, part, config):
    """And four hundred under the tuned preset, with a row for what is evicted."""
    compared, whole = serve_random(folder, part, 100, config)
    print(f"part {part}: {compared} of 100 compared, {whole} of them to their end")
    assert compared > 80 and whole > 60
