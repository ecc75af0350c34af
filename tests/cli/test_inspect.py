"""`vlcache inspect` shows what the library reports."""

import json

import pytest
import torch

from vlcache_triton.formreader import chat, encode_chats, load_form_reader, render
from vlcache_triton.integrations.transformers import vl_cache


@pytest.fixture(scope="module")
def report(dialogue):
    """The library's own, of the same prompt."""
    model, processor = load_form_reader()
    images = [render(page) for page in dialogue.pages]
    inputs = encode_chats(processor, [chat(images, [dialogue.questions[0].text])])
    with torch.inference_mode(), vl_cache(model, budget=0.2) as session:
        model.generate(**inputs, max_new_tokens=1)
    return session.report()


def test_json_is_the_report(vlcache, dialogue, page, report):
    (question,) = dialogue.questions
    asked = ("--image", page, "--prompt", question.text, "--budget", 0.2)
    outcome = vlcache("inspect", *asked, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert (result["model"], result["prompt"]) == ("form-reader", question.text)
    assert result["images"] == [str(page)]
    for name, value in report.to_dict().items():
        if name == "sparsity":
            for ours, theirs in zip(result[name], value, strict=True):
                assert ours == pytest.approx(theirs)
        elif not name.startswith("bytes_allocated"):  # head room goes by the answer's length
            assert result[name] == value, name


def test_the_table_has_a_row_a_layer(vlcache, dialogue, page, report):
    (question,) = dialogue.questions
    outcome = vlcache("inspect", "--image", page, "--prompt", question.text, "--budget", 0.2)
    assert outcome.code == 0, outcome.err
    rows = [line for line in outcome.out.splitlines() if "█" in line]
    assert len(rows) == len(report.layers)
    for row, (sparsity,), (kept,) in zip(rows, report.sparsity, report.kept, strict=True):
        assert f" {sparsity:.3f} " in row
        assert f" {kept} " in row
