"""Layers that keep a state and no KV: those of attention are packed, the others pass through."""

from dataclasses import asdict

from engine import TUNED, ask, expected_tokens, run_engine
from tiny_checkpoints import save_lfm2_vl

NAME = "lfm2_vl"


def test_a_hybrid_model_gives_our_adapters_tokens(tmp_path):
    """In chunks that end within image and question, twice, and every slot and state comes back."""
    save_lfm2_vl(tmp_path / "model")
    text = "a beginning that is shared "
    requests = [
        ask(NAME, "a prompt without any image", 0, 6, before=text),
        ask(NAME, "what is it?", 1, 6, seed=1, before=text),
        ask(NAME, "what is the difference between these?", 2, 6, seed=2, before=text),
    ]
    run = run_engine(
        tmp_path,
        [{"requests": requests}, {"requests": requests}, {"flush": True}],
        {
            "VLCACHE_PRESET": "tuned",
            "VLCACHE_BUDGET": "0.25",
            "SGLANG_MAMBA_CONV_DTYPE": "float32",
        },
        max_mamba_cache_size=64,
        chunked_prefill_size=25,
    )
    expected = [expected_tokens(tmp_path, request, **asdict(TUNED)) for request in requests]
    assert run.tokens(0) == run.tokens(1) == expected
    assert expected[1:] != [expected_tokens(tmp_path, request, None) for request in requests[1:]]
    assert run.steps[2] is True
