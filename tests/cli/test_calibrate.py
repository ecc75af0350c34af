"""`vlcache calibrate`, as a user runs it, and `vlcache eval` with its profile."""

import json

import pytest

from vlcache_triton.apps.formreader.model import WEIGHTS
from vlcache_triton.recipe.profile import HeadProfile, read_profile

QUICK = ("--suite", "count", "--pages", 1)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """Of one page, as a file."""
    from vlcache_triton.apps.cli.app import run

    path = tmp_path_factory.mktemp("calibrate") / "profile.json"
    assert run(["calibrate", *map(str, QUICK), "--out", str(path)]) == 0
    return path


def test_a_profile_is_written_and_compared(vlcache, profile, tmp_path):
    found = read_profile(profile)
    assert isinstance(found, HeadProfile)
    assert found.num_prompts == 1 and found.data == "1 synthetic form of each of 'count'"
    assert (len(found.losses), len(found.losses[0])) == (8, 2)
    assert found.ranked_by == "vl_cache" and "llava" in found.model
    command = ("eval", *QUICK, "--budget", 0.1, "--profile", profile, "--out", tmp_path, "--json")
    cells = json.loads(vlcache(*command).out)["cells"]
    variants = {cell["variant"] for cell in cells}
    assert variants == {
        "full",
        "vl_cache",
        "vl_cache, calibrated",
        "tuned",
        "tuned, calibrated",
    }
    kept = {cell["variant"]: cell["kv_bytes"] for cell in cells}
    assert kept["vl_cache, calibrated"] == kept["vl_cache"]


def test_json_is_the_profile(vlcache, page, dialogue, tmp_path):
    question = dialogue.questions[0]
    line = {"image": page.name, "question": question.text, "answers": [question.answer]}
    data = page.parent / "questions.jsonl"
    data.write_text(json.dumps(line))
    out = tmp_path / "own.json"
    own = ("--model", WEIGHTS, "--data", data, "--max-new-tokens", 2, "--preset", "tuned")
    printed = json.loads(vlcache("calibrate", *own, "--out", out, "--json").out)
    assert printed == json.loads(out.read_text())
    assert printed["ranked_by"] == "tuned" and printed["data"] == "1 question of questions.jsonl"


def test_a_profile_of_another_model_is_refused(vlcache, profile, tmp_path):
    page = json.loads(profile.read_text())
    (tmp_path / "other.json").write_text(json.dumps(page | {"model": "qwen2_vl 'other' ()"}))
    command = ("eval", *QUICK, "--budget", 0.1, "--out", tmp_path / "out")
    outcome = vlcache(*command, "--profile", tmp_path / "other.json")
    assert outcome.code == 2 and "policy: got one made for qwen2_vl" in outcome.err


WRONG = {
    "no such file": (("eval", "--profile", "none.json"), "profile: cannot read 'none.json'"),
    "another model without data": (("calibrate", "--model", "some/model"), "data: got none"),
    "an unknown suite": (("calibrate", "--suite", "all"), "suite: got 'all', expected one of"),
    "suites of own data": (("calibrate", "--suite", "count", "--data", "."), "suite: got one with"),
    "no questions": (("calibrate", "--data", "none.jsonl"), "data: cannot read 'none.jsonl'"),
}


@pytest.mark.parametrize(("command", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_a_line(vlcache, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    outcome = vlcache(*command)
    assert outcome.code == 2 and outcome.err.startswith(f"vlcache: {message}"), outcome
    assert not list(tmp_path.iterdir())
