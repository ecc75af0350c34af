"""What the engine generates: Transformers' tokens at budget 1.0, our adapter's below it."""

import pytest
from engine import MODELS, ask, expected_tokens, run_engine


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    """(name, folder) of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    MODELS[request.param](folder / "model")
    return request.param, folder


def mixed_batch(name: str, max_new_tokens: int = 8) -> list[dict]:
    """Text, one image, two images, and the first image again, in one batch."""
    return [
        ask(name, "a prompt without any image", 0, max_new_tokens),
        ask(name, "what is it?", 1, max_new_tokens, seed=1),
        ask(name, "what is the difference between these?", 2, max_new_tokens, seed=2),
        ask(name, "and this one?", 1, max_new_tokens, seed=1),
    ]


def test_the_whole_cache_gives_transformers_tokens(checkpoint):
    name, folder = checkpoint
    requests = mixed_batch(name)
    run = run_engine(folder, [{"requests": requests}], {"VLCACHE_BUDGET": "1.0"})
    assert run.tokens() == [expected_tokens(folder, r, None) for r in requests]
    assert "vlcache: on, budget 1.0" in run.log


def test_a_quarter_of_the_cache_gives_our_adapters_tokens(checkpoint):
    name, folder = checkpoint
    requests = mixed_batch(name)
    run = run_engine(folder, [{"requests": requests}], {"VLCACHE_BUDGET": "0.25"})
    expected = [expected_tokens(folder, r, 0.25) for r in requests]
    assert run.tokens() == expected
    assert expected != [expected_tokens(folder, r, None) for r in requests]  # it does matter
    assert "vlcache: on, prompts with an image keep 25%" in run.log
    assert "vlcache: 2048 KV slots hold" in run.log


def test_chunked_prefill_changes_nothing(checkpoint):
    """Chunks that end within the image and within the query rows; overlap and radix cache off."""
    name, folder = checkpoint
    requests = mixed_batch(name)
    run = run_engine(
        folder,
        [{"requests": requests}],
        {"VLCACHE_BUDGET": "0.25"},
        chunked_prefill_size=20,
        disable_overlap_schedule=True,
        disable_radix_cache=True,
    )
    assert run.tokens() == [expected_tokens(folder, r, 0.25) for r in requests]
    assert run.log.count("Prefill batch") > 2 * len(requests)
