"""What a user can put right is one line on stderr and exit code 2, with nothing on stdout."""

import json

import huggingface_hub
import pytest
from transformers.utils import is_torchvision_available

from vlcache_triton.apps.formreader.model import WEIGHTS


def fails(outcome, *words):
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("vlcache: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize("command", ["demo", "generate", "inspect"])
@pytest.mark.parametrize("budget", ["0", "-0.5", "1.5", "nan"])
def test_a_budget_out_of_range(vlcache, page, command, budget):
    asked = () if command == "demo" else ("--image", page, "--prompt", "?")
    fails(
        vlcache(command, *asked, "--budget", budget, "--json"), "budget", f"got {budget}", "(0, 1]"
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("frobnicate",), "frobnicate"),
        (("demo", "--budget", "much"), "--budget"),
        (("demo", "--questions", "0"), "--questions"),
        (("demo", "--fields", "145"), "--fields"),
        (("demo", "--colour"), "--colour"),
        (("generate", "--prompt", "?"), "--image"),
        (("inspect", "--image", "x.png"), "--prompt"),
    ],
)
def test_a_wrong_option_is_named(vlcache, arguments, word):
    fails(vlcache(*arguments), word)


def test_a_page_that_cannot_be_written(vlcache, tmp_path):
    fails(vlcache("demo", "--out", tmp_path / "no" / "page.png"), "out", "No such file")


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_an_unreadable_image_is_named(vlcache, page, tmp_path, command):
    missing, text, cut = (tmp_path / name for name in ("missing.png", "text.png", "cut.png"))
    text.write_text("not an image")
    cut.write_bytes(page.read_bytes()[:400])
    for path in (missing, text, cut, tmp_path):
        fails(vlcache(command, "--image", path, "--prompt", "?"), "image", repr(str(path)))
    fails(vlcache(command, "--image", page, "--image", missing, "--prompt", "?"), str(missing))


def test_a_lossless_budget_measures_nothing(vlcache, page):
    fails(vlcache("inspect", "--image", page, "--prompt", "?", "--budget", "1"), "budget")


def test_image_tokens_in_the_prompt(vlcache, page):
    outcome = vlcache("generate", "--image", page, "--prompt", "<image> and <image>?")
    fails(outcome, "prompt", "got 2 <image>")


def test_an_unknown_model(vlcache, page, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for model in ("nobody/nothing", tmp_path / "missing", "not a name"):
        outcome = vlcache("generate", "--image", page, "--prompt", "?", "--model", model)
        fails(outcome, "model", repr(str(model)))


def test_a_folder_that_holds_no_model(vlcache, page, tmp_path):
    outcome = vlcache("generate", "--image", page, "--prompt", "?", "--model", tmp_path)
    fails(outcome, "model", repr(str(tmp_path)))


def test_a_model_of_another_kind(vlcache, page, tmp_path):
    for file in WEIGHTS.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    outcome = vlcache("generate", "--image", page, "--prompt", "?", "--model", tmp_path)
    fails(outcome, "model", "LlamaConfig")


def test_code_of_a_model_is_never_run(vlcache, page, tmp_path):
    for file in WEIGHTS.iterdir():
        (tmp_path / file.name).symlink_to(file)
    proof = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(proof)!r}, 'w')")
    config = {"model_type": "foreign", "auto_map": {}}
    for name in ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"):
        config["auto_map"][name] = "code.Foreign"
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = vlcache("generate", "--image", page, "--prompt", "?", "--model", tmp_path)
    fails(outcome, "model", "custom code")
    assert not proof.exists()


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_a_processor_without_torchvision(vlcache, page, tmp_path, command):
    """Qwen-VL processors take it, for their videos; the line says how to get it."""
    for file in WEIGHTS.iterdir():
        if file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    outcome = vlcache(command, "--image", page, "--prompt", "?", "--model", tmp_path)
    fails(outcome, "model", repr(str(tmp_path)), "pip install torchvision")
