"""Slots: what is freed is used, and every one comes back. SGLang's own checks are on in all."""

import random

import pytest
from engine import ask, expected_tokens, run_engine
from tiny_checkpoints import save_qwen2_5_vl

NAME = "qwen2_5_vl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a tiny Qwen2.5-VL."""
    folder = tmp_path_factory.mktemp(NAME)
    save_qwen2_5_vl(folder / "model")
    return folder


def same_length(count: int, max_new_tokens: int) -> list[dict]:
    """Requests that differ in their image alone, so that the pool decides how many run."""
    return [ask(NAME, "what is this?", 1, max_new_tokens, seed=3 * i) for i in range(count)]


def test_a_pool_for_two_dense_requests_serves_at_least_twice_as_many(folder):
    question = "what is this, and what was it before it became what it is?"
    requests = [ask(NAME, question, 1, 10, seed=3 * i) for i in range(6)]  # 77 + 10 tokens each
    pool = dict(max_total_tokens=230)
    steps = [{"requests": requests}, {"flush": True}]
    dense = run_engine(folder, steps, {"VLCACHE_BUDGET": "1.0"}, **pool)
    packed = run_engine(folder, steps, {"VLCACHE_BUDGET": "0.25"}, **pool)
    assert dense.most_running < 3
    assert packed.most_running >= 2 * dense.most_running
    assert dense.tokens() == [expected_tokens(folder, r, None) for r in requests]
    assert packed.tokens() == [expected_tokens(folder, r, 0.25) for r in requests]
    assert dense.steps[1] is packed.steps[1] is True


def test_retracted_requests_lose_no_slot(folder):
    """They prefill again, keep the same tokens, and their earlier outputs are left whole."""
    requests = [*same_length(3, 12), ask(NAME, "text alone", 0, 12)]
    run = run_engine(
        folder,
        [{"requests": requests}, {"flush": True}, {"requests": requests[:1]}],
        {"VLCACHE_BUDGET": "0.25", "SGLANG_TEST_RETRACT": "1"},
    )
    assert sum(result["retractions"] for result in run.steps[0]) > 0
    assert all(len(tokens) == 12 for tokens in run.tokens())
    assert run.tokens()[3] == expected_tokens(folder, requests[3], None)
    assert run.steps[1] is True and len(run.tokens(2)[0]) == 12


def test_index_only_mode_decodes_the_same_and_keeps_prefix_reuse(folder):
    requests = [*same_length(2, 6), ask(NAME, "text alone", 0, 6)]
    steps = [{"requests": requests}, {"requests": requests}]
    run = run_engine(folder, steps, {"VLCACHE_BUDGET": "0.25", "VLCACHE_PACK": "0"})
    expected = [expected_tokens(folder, r, 0.25) for r in requests]
    assert run.tokens(0) == run.tokens(1) == expected
    assert all(result["cached_tokens"] > 0 for result in run.steps[1])
    assert "no memory is freed" in run.log


def test_the_triton_kernels_serve_it_too_behind_a_text_prefix_of_the_tree(folder):
    text = "a beginning that is shared "
    first = [ask(NAME, text, 0, 2)]
    then = [ask(NAME, "what is this?", 1, 4, seed=i, before=text) for i in range(2)]
    then.append(ask(NAME, text + "by text alone", 0, 4))
    steps = [{"requests": first}, {"requests": then}, {"flush": True}]
    environ = {"VLCACHE_BUDGET": "0.25", "VLCACHE_KERNELS": "triton"}
    run = run_engine(folder, steps, environ, chunked_prefill_size=32)
    assert run.tokens(1) == [expected_tokens(folder, r, 0.25) for r in then]
    assert all(result["cached_tokens"] == len(text) for result in run.steps[1])
    assert run.steps[2] is True


def test_an_answer_does_not_depend_on_what_the_tree_holds(folder):
    """A text prefix that would leave the image prompt fewer slots than it keeps is not taken."""
    text = "a beginning that is shared by all, and much longer than all of what follows it here "
    image = ask(NAME, "what?", 1, 6, seed=1, before=text)
    steps = [{"requests": [image]}, {"requests": [ask(NAME, text, 0, 2)]}, {"requests": [image]}]
    run = run_engine(folder, [*steps, {"flush": True}], {"VLCACHE_BUDGET": "0.25"})
    expected = expected_tokens(folder, image, 0.25)
    assert expected != expected_tokens(folder, image, None), "compression should be seen"
    assert run.tokens(0)[0] == run.tokens(2)[0] == expected
    assert 0 < run.steps[2][0]["cached_tokens"] < len(text)
    assert run.steps[3] is True


def random_requests(count: int, seed: int) -> list[dict]:
    """Of all lengths, with 0 to 2 images; some share a beginning, some are aborted on the way."""
    rng, requests = random.Random(seed), []
    for i in range(count):
        text = "the same beginning " * rng.randint(0, 2) + "x" * rng.randint(1, 60)
        request = ask(NAME, text, rng.choice([0, 1, 1, 2]), rng.randint(1, 12), seed=i)
        if rng.random() < 0.2:
            request["abort_after"] = rng.randint(1, request["max_new_tokens"])
        requests.append(request)
    return requests


def serve_random(folder, count: int, **engine):
    requests = random_requests(count, seed=count)
    waves = [{"requests": requests[i : i + 40]} for i in range(0, count, 40)]
    run = run_engine(
        folder,
        [*waves, {"flush": True}],
        {"VLCACHE_BUDGET": "0.25"},
        max_total_tokens=500,
        **engine,
    )
    assert run.steps[-1] is True, "a slot or a request is left"
    results = [result for step in run.steps[:-1] for result in step]
    for request, result in zip(requests, results, strict=True):
        if result["finish"] != "abort":
            assert len(result["output_ids"]) == request["max_new_tokens"]
    finished = [i for i, result in enumerate(results) if result["finish"] != "abort"]
    for i in finished[:: max(len(finished) // 12, 1)]:
        assert results[i]["output_ids"] == expected_tokens(folder, requests[i], 0.25), requests[i]
    return run


def test_random_requests_give_every_slot_back(folder):
    serve_random(folder, 24, chunked_prefill_size=48)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [True, False])
def test_two_hundred_random_requests_give_every_slot_back(folder, overlap):
    serve_random(folder, 200, chunked_prefill_size=48, disable_overlap_schedule=not overlap)
