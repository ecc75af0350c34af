"""`vlcache inspect` shows what the library reports."""

import json

import pytest
import torch

from vlcache_triton.apps.formreader import chat, encode_chats, render
from vlcache_triton.integrations.transformers import vl_cache


@pytest.fixture(scope="module")
def report(dialogue, form_reader):
    """The library's own, of the same prompt."""
    model, processor = form_reader
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


def test_pictures_of_several_images(vlcache, dialogue, page, tmp_path):
    """Their paths are printed last, and told in JSON; the table stays."""
    (question,) = dialogue.questions
    asked = ("--image", page, "--image", page, "--prompt", question.text, "--budget", 0.2)
    outcome = vlcache("inspect", *asked, "--out", tmp_path / "report")
    assert outcome.code == 0, outcome.err
    kinds = ("kept", "layers", "scores")
    names = ["budgets.png", *(f"{kind}-{i}.png" for i in (1, 2) for kind in kinds)]
    expected = [str(tmp_path / "report" / name) for name in names]
    assert outcome.out.splitlines()[-len(expected) :] == expected
    again = json.loads(vlcache("inspect", *asked, "--out", tmp_path / "report", "--json").out)
    assert again["pictures"] == expected
    assert sorted(str(path) for path in (tmp_path / "report").iterdir()) == sorted(expected)


def test_without_out_nothing_is_drawn(vlcache, dialogue, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (question,) = dialogue.questions
    outcome = vlcache("inspect", "--image", page, "--prompt", question.text, "--json")
    assert json.loads(outcome.out)["pictures"] == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(vlcache, dialogue, page, tmp_path):
    (question,) = dialogue.questions
    (tmp_path / "file").write_text("in the way")
    asked = ("--image", page, "--prompt", question.text, "--out", tmp_path / "file" / "report")
    outcome = vlcache("inspect", *asked)
    assert outcome.code == 2
    assert outcome.err.startswith("vlcache: out: cannot write to ")


def test_a_grid_that_cannot_be_told(vlcache, dialogue, page, tmp_path, monkeypatch):
    """The budgets are drawn all the same, and a line says why nothing else is."""
    from vlcache_triton.apps import pictures

    def unknown(*_):
        raise pictures.UnknownGridError("the image grid of 'other' models cannot be recovered")

    monkeypatch.setattr(pictures, "image_grids", unknown)
    (question,) = dialogue.questions
    asked = ("--image", page, "--prompt", question.text, "--out", tmp_path)
    outcome = vlcache("inspect", *asked)
    assert outcome.code == 0
    assert "no pictures of the image: the image grid of 'other'" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["budgets.png"]
