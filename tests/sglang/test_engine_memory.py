"""Slots: what is freed is used, and every one comes back. SGLang's own checks are on in all."""

from dataclasses import asdict, replace

import pytest
from engine import TUNED, ask, expected_tokens, run_engine
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


@pytest.mark.parametrize("preset", ["paper", "tuned"])
def test_retracted_requests_lose_no_slot(folder, preset):
    """They prefill again, keep the same tokens, and their earlier outputs are left whole."""
    requests = [*same_length(3, 12), ask(NAME, "text alone", 0, 12)]
    run = run_engine(
        folder,
        [{"requests": requests}, {"flush": True}, {"requests": requests[:1]}],
        {"VLCACHE_PRESET": preset, "VLCACHE_BUDGET": "0.25", "SGLANG_TEST_RETRACT": "1"},
    )
    assert sum(result["retractions"] for result in run.steps[0]) > 0
    assert all(len(tokens) == 12 for tokens in run.tokens())
    assert run.tokens()[3] == expected_tokens(folder, requests[3], None)
    assert run.steps[1] is True and len(run.tokens(2)[0]) == 12


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


def test_a_row_stands_for_what_is_evicted(folder):
    """The tuned preset, in chunks, behind a text prefix of the tree, and again once it is gone."""
    text = "a beginning that is shared "
    requests = [ask(NAME, "what is this?", 1, 5, seed=i, before=text) for i in range(2)]
    requests.append(ask(NAME, text + "by text alone", 0, 5))
    first = [ask(NAME, text, 0, 2)]
    steps = [{"requests": first}, {"requests": requests}, {"flush": True}, {"requests": requests}]
    environ = {"VLCACHE_PRESET": "tuned", "VLCACHE_BUDGET": "0.25"}
    run = run_engine(folder, [*steps, {"flush": True}], environ, chunked_prefill_size=32)
    expected = [expected_tokens(folder, r, **asdict(TUNED)) for r in requests]
    assert run.tokens(1) == run.tokens(3) == expected
    without = asdict(replace(TUNED, remainder="none"))
    assert expected[:2] != [expected_tokens(folder, r, **without) for r in requests[:2]]
    assert all(result["cached_tokens"] == len(text) for result in run.steps[1])
    assert run.steps[2] is run.steps[4] is True
    assert "remainder='mean'" in run.log


def test_an_answer_does_not_depend_on_what_the_tree_holds(folder):
    """A text prefix that would leave the image prompt fewer slots than it keeps is not taken; a
    whole image prompt, left there by a request that decoded nothing, is."""
    text = "a beginning that is shared by all, and much longer than all of what follows it here "
    image = ask(NAME, "what?", 1, 6, seed=1, before=text)
    other = ask(NAME, "and what is this, of which little can be seen?", 1, 6, seed=2)
    scored = {**other, "max_new_tokens": 1}
    waves = [image], [ask(NAME, text, 0, 2)], [image], [scored], [scored], [other]
    steps = [*({"requests": wave} for wave in waves), {"flush": True}]
    run = run_engine(folder, steps, {"VLCACHE_BUDGET": "0.25"})
    cached = [wave[0]["cached_tokens"] for wave in run.steps[:-1]]
    tokens = [wave[0]["output_ids"] for wave in run.steps[:-1]]
    expected = [expected_tokens(folder, request, 0.25) for request in (image, other)]
    whole = [expected_tokens(folder, request, None) for request in (image, other)]
    assert expected[0] != whole[0] and expected[1] != whole[1], "compression should be seen"
    assert tokens[0] == tokens[2] == expected[0]
    assert 0 < cached[2] < len(text)
    assert tokens[3] == tokens[4] == expected[1][:1]
    assert tokens[5] == expected[1]
    assert cached[4] > cached[5] > 18, "the image is found there, the query rows are not taken"
    assert run.steps[-1] is True
