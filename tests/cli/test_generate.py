"""`vlcache generate` takes any model, any number of images, with a chat template or without."""

import json

import pytest

from vlcache_triton.formreader.model import WEIGHTS

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
    assert "KV cache" in outcome.err


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
