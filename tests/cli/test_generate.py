"""`vlcache generate` takes any model, any number of images, with a chat template or without."""

import json

import numpy as np
import pytest
from PIL import Image

from vlcache_triton.apps.formreader.model import WEIGHTS

NUM_VISUAL = 24 * 24


def run_json(vlcache, *arguments):
    outcome = vlcache("generate", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_it_answers_from_a_share_of_the_cache(vlcache, dialogue, page):
    (question,) = dialogue.questions
    asked = ("--image", page, "--prompt", question.text)
    result = run_json(vlcache, *asked, "--budget", 0.6)
    assert result["answer"] == question.answer
    assert (result["model"], result["images"], result["prompt"], result["budget"]) == (
        "form-reader",
        [str(page)],
        question.text,
        0.6,
    )
    assert result["new_tokens"] == len(question.answer) + 1
    assert result["prompt_tokens"] > NUM_VISUAL
    assert result["kv_bytes"] == pytest.approx(0.6 * result["full_kv_bytes"], rel=0.01)
    assert sum(result["kept"]) * result["full_kv_bytes"] == pytest.approx(
        result["kv_bytes"] * result["prompt_tokens"] * len(result["kept"])
    )
    assert result["seconds"] > 0


def test_a_budget_of_1_keeps_all(vlcache, dialogue, page):
    asked = ("--image", page, "--prompt", dialogue.questions[0].text)
    whole = run_json(vlcache, *asked, "--budget", 1)
    part = run_json(vlcache, *asked, "--budget", 0.5)
    assert whole["answer"] == dialogue.questions[0].answer
    assert whole["kept"] == [whole["prompt_tokens"]] * 8
    assert whole["kv_bytes"] == whole["full_kv_bytes"] == part["full_kv_bytes"]


def test_only_the_answer_goes_to_stdout(vlcache, dialogue, page):
    (question,) = dialogue.questions
    outcome = vlcache("generate", "--image", page, "--prompt", question.text, "--budget", 0.6)
    assert outcome.code == 0
    assert outcome.out == question.answer + "\n"
    assert "KV cache" in outcome.err and len(outcome.err.splitlines()) == 1


def test_a_budget_below_what_the_embedded_model_bears_is_told(vlcache, dialogue, page, monkeypatch):
    """Behind the answer, or in the JSON; of another model, nobody knows what it bears."""
    monkeypatch.setenv("COLUMNS", "200")
    note = "form-reader bears budgets down to 0.6 with --preset paper; at 0.3 expect wrong answers"
    asked = ("--image", page, "--prompt", dialogue.questions[0].text, "--budget", 0.3)
    outcome = vlcache("generate", *asked)
    assert outcome.code == 0
    assert note in outcome.err.splitlines()[-1] and note not in outcome.out
    assert run_json(vlcache, *asked)["note"].startswith(note)
    assert run_json(vlcache, *asked, "--model", WEIGHTS)["note"] is None
    assert run_json(vlcache, *asked[:4], "--budget", 0.6)["note"] is None
    assert run_json(vlcache, *asked, "--preset", "tuned")["note"] is None


def test_a_16_bit_page_is_answered_as_the_page(vlcache, dialogue, page, tmp_path):
    """It was clipped to white, and answered all the same."""
    with Image.open(page) as drawn:
        grey = np.asarray(drawn.convert("L"))
    Image.fromarray(grey).save(tmp_path / "grey8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    asked = ("--prompt", dialogue.questions[0].text, "--budget", 0.6)
    results = [
        run_json(vlcache, "--image", tmp_path / f"grey{bits}.png", *asked) for bits in (8, 16)
    ]
    answers = [result["answer"] for result in results]
    assert answers[0] == answers[1] == dialogue.questions[0].answer
    assert results[0]["kept"] == results[1]["kept"]


def test_a_folder_is_a_model(vlcache, dialogue, page):
    asked = ("--image", page, "--prompt", dialogue.questions[0].text, "--budget", 0.6)
    result = run_json(vlcache, *asked, "--model", WEIGHTS)
    assert result["model"] == str(WEIGHTS)
    assert result["answer"] == dialogue.questions[0].answer


@pytest.mark.parametrize("marks", ["<image>", ""])
def test_a_model_without_a_chat_template_gets_the_prompt_as_it_is(
    vlcache, dialogue, page, tmp_path, marks
):
    """Where the prompt does not say where the image goes, it goes to the front."""
    for file in WEIGHTS.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    prompt = f"{marks}\n{dialogue.questions[0].text} ASSISTANT: "
    asked = ("--image", page, "--prompt", prompt, "--budget", 0.6, "--max-new-tokens", 3)
    result = run_json(vlcache, *asked, "--model", tmp_path)
    assert result["prompt_tokens"] == NUM_VISUAL + len(prompt.removeprefix(marks))
    assert result["new_tokens"] <= 3


def test_several_images(vlcache, page):
    asked = ("--image", page, "--image", page, "--prompt", "How many fields are there?")
    result = run_json(vlcache, *asked, "--budget", 0.3, "--max-new-tokens", 3)
    assert result["images"] == [str(page), str(page)]
    assert result["prompt_tokens"] > 2 * NUM_VISUAL
