"""The study's masks are the recipe's plans, and an answer that sees everything survives."""

import sys
from pathlib import Path

import pytest
import torch

from vlcache_triton import VLCacheConfig
from vlcache_triton.apps.evaluation import Query, Recording, Variant
from vlcache_triton.apps.evaluation.variants import tuned_snapkv
from vlcache_triton.apps.formreader import chat, draw_dialogue, encode_chats, render
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.names import CACHE
from vlcache_triton.recipe.policies import snapkv

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy"))

import study_scores

NAMES = {
    "paper": VLCacheConfig(budget=0.1),
    "paper, uniform layers": VLCacheConfig(budget=0.1, allocation="uniform"),
    "last 16 rows, mean of 3": VLCacheConfig(budget=0.1, max_query_rows=16, smoothing=3),
    "last 16, mean of 3, one set a layer": VLCacheConfig(
        budget=0.1, max_query_rows=16, smoothing=3, granularity="layer"
    ),
    "paper; a row": VLCacheConfig(budget=0.1, remainder="mean"),
    "last 16, mean of 3, row and group maximum": VLCacheConfig(
        budget=0.1, max_query_rows=16, smoothing=3, row_reduction="max", group_reduction="max"
    ),
    "all post-vision rows, row and group maximum, one set a layer; a row": VLCacheConfig.tuned(
        budget=0.1
    ),
}


@pytest.fixture(scope="module")
def study():
    return study_scores.Study()


def candidate(name):
    return next(c for c in study_scores.CANDIDATES if c.name == name)


@pytest.fixture(scope="module")
def seen_and_recording(study):
    """What the study sees of tuning page 0, and the evaluation's recording of the same prompt."""
    assert study.ask("value", 0, ()) == {}
    dialogue = draw_dialogue("tune-value-0", ["value"])
    messages = [chat([render(p) for p in dialogue.pages], [dialogue.questions[0].text])]
    inputs = dict(encode_chats(study.processor, messages))
    with vl_cache(study.model, VLCacheConfig(budget=1.0), cuda_graph=False):
        query = Query(inputs, torch.empty(0, dtype=torch.int64))
        recording = Recording(study.model, query, 4)
    return study.look(inputs["input_ids"][0], 1), recording


VARIANTS = {name: Variant(name, config) for name, config in NAMES.items()} | {
    "SnapKV, window 20, maximum of 5": tuned_snapkv(0.1),
    "SnapKV, window 20, maximum of 3; a row": tuned_snapkv(0.1, "mean"),
    "SnapKV, window 32, mean of 5": Variant("", VLCacheConfig(budget=0.1), snapkv()),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_candidate_keeps_what_the_recipe_keeps(seen_and_recording, name):
    seen, recording = seen_and_recording
    mask = candidate(name).keep(seen, 0.1)
    plan = recording.plan_for(VARIANTS[name])
    differing = 0
    for layer in range(len(mask)):
        for head, kept in enumerate(plan.kept_positions(layer, 0).tolist()):
            differing += len(set(kept) ^ set(mask[layer, head].nonzero().flatten().tolist()))
    assert differing <= 4  # two scores that are equal but for rounding


def test_snapkv_has_as_many_candidates_as_the_tuned_preset():
    number = sum(c.name.startswith("SnapKV") for c in study_scores.CANDIDATES)
    assert (number, len(study_scores.CANDIDATES) - number) == (112, 108)


def test_what_sees_everything_survives(study, monkeypatch):
    everything = study_scores.Candidate("all", lambda seen: study_scores.grouped(seen.all_rows))
    monkeypatch.setattr(study_scores, "CANDIDATES", [everything])
    for name in study_scores.SETS:
        assert study.ask(name, 1, (1.0,)) in (None, {"1.0|all": True})


def test_a_row_is_the_compressed_caches(study, seen_and_recording):
    """The logits behind a token of the answer, on the study's masks and on the cache itself."""
    seen, recording = seen_and_recording
    assert study.ask("value", 0, ()) == {}
    chosen = candidate("all post-vision rows, row and group maximum, one set a layer; a row")
    study.keep, study.remainder = chosen.keep(seen, 0.1)[:, None], torch.tensor([True])
    ids = torch.tensor([40, 41, 42])
    expected = study._logits(ids, 1)[0]
    with vl_cache(study.model, VLCacheConfig(budget=1.0), cuda_graph=False), torch.no_grad():
        plan = recording.plan_for(Variant("tuned", VLCacheConfig.tuned(budget=0.1)))
        copies = recording.compress([plan])
        out = study.model(input_ids=ids[None], **{CACHE: copies}, use_cache=True)
    torch.testing.assert_close(out.logits[0], expected, atol=1e-3, rtol=0)


def test_the_table_counts_survivors(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(
        '{"set": "value", "index": 0, "survived": {"0.1|a": true, "0.2|a": true}}\n'
        '{"set": "value", "index": 1, "survived": {"0.1|a": false, "0.2|a": true}}\n'
        '{"set": "value", "index": 2, "survived": null}\n'
    )
    table = study_scores.table(path)
    assert "gives right: 2 of value." in table
    assert "| candidate | 10% | 20% |" in table
    assert "| a | 0.500 (0.09 to 0.91) | 1.000 (0.34 to 1.00) |" in table
