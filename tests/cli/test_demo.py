"""`vlcache demo` answers, measures, and says what it measured."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from vlcache_triton.apps.cli.demo import DEFAULT_BUDGET, DEFAULT_SEED, SWEEP
from vlcache_triton.apps.formreader import draw_form, render_form

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, FLOAT32 = 8, 2, 64, 4
BYTES_A_TOKEN = 2 * NUM_KV_HEADS * HEAD_DIM * FLOAT32  # K and V, of one layer
NUM_VISUAL = 24 * 24


def run_json(vlcache, *arguments):
    outcome = vlcache("demo", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_the_default_budget_keeps_the_answers_and_the_bytes_are_the_budgets(vlcache, tmp_path):
    result = run_json(vlcache, "--out", tmp_path / "page.png")
    assert len(result["questions"]) == 5
    for each in result["questions"]:
        full, compressed = each["full"], each["compressed"]
        assert full["answer"] == compressed["answer"] == each["expected"]
        prompt = f"<s>USER: \n{each['question']} ASSISTANT: ".removeprefix("<s>")
        tokens = 1 + NUM_VISUAL + len(prompt)
        assert full["kv_bytes"] == NUM_LAYERS * tokens * BYTES_A_TOKEN
        assert compressed["budget"] == DEFAULT_BUDGET
        assert len(compressed["kept"]) == NUM_LAYERS
        assert compressed["kv_bytes"] == sum(compressed["kept"]) * BYTES_A_TOKEN
        assert compressed["kv_bytes"] == pytest.approx(DEFAULT_BUDGET * full["kv_bytes"], rel=0.01)
        assert full["seconds"] > 0 and compressed["seconds"] > 0


def test_the_page_is_written_and_is_the_seeds(vlcache, tmp_path):
    out = tmp_path / "page"
    result = run_json(vlcache, "--out", out, "--seed", 8, "--fields", 4, "--questions", 1)
    expected = draw_form("demo-8", ["value"], 4)
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), np.asarray(render_form(expected.pages[0])))
    assert [each["question"] for each in result["questions"]] == [expected.questions[0].text]
    assert result["questions"][0]["expected"] == expected.questions[0].answer


def test_a_budget_of_1_is_the_full_cache(vlcache, tmp_path):
    arguments = ("--budget", 1, "--questions", 1, "--out", tmp_path / "page.png")
    (each,) = run_json(vlcache, *arguments)["questions"]
    tokens = each["full"]["kv_bytes"] // (NUM_LAYERS * BYTES_A_TOKEN)
    assert each["compressed"]["kept"] == [tokens] * NUM_LAYERS
    assert each["compressed"]["kv_bytes"] == each["full"]["kv_bytes"]
    assert each["compressed"]["answer"] == each["full"]["answer"]


def test_the_sweep_shows_where_answers_break(vlcache, tmp_path):
    arguments = ("--preset", "paper", "--sweep", "--questions", 1, "--out", tmp_path / "page.png")
    result = run_json(vlcache, *arguments)
    rows = result["sweep"]
    assert [row["budget"] for row in rows] == list(SWEEP)
    (question,) = result["questions"]
    full = question["full"]
    for row in rows:
        assert row["kv_bytes"] == pytest.approx(row["budget"] * full["kv_bytes"], rel=0.01)
        (answer,) = row["answers"]
        assert row["same_as_full"] == (answer == full["answer"])
        assert row["right"] == (answer == question["expected"])
    assert rows[0]["right"] == 0
    assert rows[-1]["right"] == 1


def test_the_tables_show_the_answers_the_layers_and_how_to_go_on(vlcache, tmp_path, monkeypatch):
    """The command that it ends with runs as it is printed."""
    monkeypatch.chdir(tmp_path)
    code, text, _ = vlcache("demo", "--questions", 1, "--budget", 0.4)
    assert code == 0
    (question,) = draw_form(f"demo-{DEFAULT_SEED}", ["value"], 8).questions
    assert f"{question.answer} ✓" in text
    for layer in range(NUM_LAYERS):
        assert f"│     {layer} │" in text
    told = " ".join(text.split())
    assert "Saved 60% of the prompt's KV cache" in told and "It cost no right answer." in told
    assert "The page: vlcache-demo.png" in text
    (command,) = [line for line in text.splitlines() if line.startswith("vlcache inspect ")]
    assert vlcache(*shlex.split(command)[1:]).code == 0
    assert (tmp_path / "vlcache-report" / "kept-1.png").exists()
