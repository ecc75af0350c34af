"""`vlcache eval`, as a user runs it."""

import json

import pytest

from vlcache_triton.apps.cli.app import run
from vlcache_triton.apps.evaluation import SUITES, form_item
from vlcache_triton.apps.formreader.model import WEIGHTS


def test_forms_are_evaluated_and_a_second_run_goes_on(tmp_path, capsys):
    command = ["eval", "--suite", "count", "--budget", "0.2", "--budget", "1", "--out"]
    assert run([*command, str(tmp_path / "out"), "--pages", "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["about"]["model"] == "form-reader"
    variants = {cell["variant"] for cell in summary["cells"]}
    assert {
        "full",
        "vl_cache",
        "tuned",
        "snapkv",
        "attention oracle",
        "all rows, uniform",
    } <= variants
    first = (tmp_path / "out" / "results.jsonl").read_text()
    assert run([*command, str(tmp_path / "out"), "--pages", "2"]) == 0
    out = capsys.readouterr().out
    assert "Ablation" in out and "report.md" in out
    both = (tmp_path / "out" / "results.jsonl").read_text()
    assert both.startswith(first) and len(both.splitlines()) == 2
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"settings.json", "summary.json", "report.md", "count.png", "accuracy.svg"} <= written
    assert run(["eval", "--suite", "count", "--budget", "0.3", "--out", str(tmp_path / "out")]) == 2
    assert "holds results of" in capsys.readouterr().err


def test_some_variants_on_other_pages(tmp_path, capsys):
    command = ["eval", "--suite", "count", "--budget", "0.2", "--pages", "1", "--split", "other"]
    command += ["--variant", "tuned", "--variant", "attention oracle"]
    assert run([*command, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert {row["variant"] for row in result["rows"]} == {"full", "tuned", "attention oracle"}
    other = form_item(next(s for s in SUITES if s.name == "count"), 0, "other")
    assert result["answers"] == list(other.answers)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["split"] == "other"
    assert settings["variants"] == ["attention oracle", "tuned"]
    assert run([*command[:-2], "--out", str(tmp_path)]) == 2  # fewer variants are other results
    assert "holds results of" in capsys.readouterr().err


def own_page(folder):
    """A folder with one question."""
    item = form_item(next(s for s in SUITES if s.name == "value"), 0)
    item.images[0].save(folder / "page.png")
    line = {"image": "page.png", "question": item.turns[0], "answers": list(item.answers)}
    (folder / "questions.jsonl").write_text(json.dumps(line))
    return folder


def test_own_questions_about_own_images(tmp_path, capsys):
    own_page(tmp_path)
    command = ["eval", "--model", str(WEIGHTS), "--data", str(tmp_path), "--max-new-tokens", "9"]
    assert run([*command, "--budget", "0.8", "--json", "--out", str(tmp_path / "out")]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    full = next(cell for cell in cells if cell["variant"] == "full")
    assert full["suite"] == "questions" and full["exact"] == 1.0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings == {"model": str(WEIGHTS), "data": str(tmp_path), "budgets": [0.8]}


def test_a_command_that_failed_leaves_nothing_behind(tmp_path, capsys):
    """Its settings used to refuse the corrected one."""
    out, data = tmp_path / "out", own_page(tmp_path)
    command = ["eval", "--budget", "0.8", "--max-new-tokens", "9", "--out", str(out)]
    (tmp_path / "empty").mkdir()
    for wrong in (
        ["--data", str(tmp_path / "nofile")],
        ["--data", str(tmp_path / "empty")],
        ["--data", str(data), "--model", str(tmp_path / "nomodel")],
        ["--data", str(data), "--device", "cuda:99"],
    ):
        assert run([*command, *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert not out.exists()
    assert run([*command, "--data", str(data)]) == 0
    assert "report.md" in capsys.readouterr().out


def test_settings_without_results_refuse_nothing(tmp_path, capsys):
    """As where the first question failed, or an older version left them."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text('{"model": "nofile"}')
    (out / "results.jsonl").touch()
    command = ["eval", "--suite", "count", "--pages", "1", "--budget", "0.8", "--out", str(out)]
    assert run([*command, "--dtype", "bfloat16"]) == 0
    settings = json.loads((out / "settings.json").read_text())
    assert settings == {"model": None, "data": None, "budgets": [0.8], "dtype": "bfloat16"}
    assert run(command) == 2
    assert "holds results of" in capsys.readouterr().err


@pytest.mark.parametrize("spoilt", ["", "{"])
def test_results_whose_settings_cannot_be_read(tmp_path, capsys, spoilt):
    (tmp_path / "results.jsonl").write_text("{}\n")
    if spoilt:
        (tmp_path / "settings.json").write_text(spoilt)
    assert run(["eval", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vlcache: out: ") and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "nonsense"], "suite: got 'nonsense'"),
        (["--budget", "0"], "budget: got [0.0]"),
        (["--budget", "1.5"], "budget: got [1.5]"),
        (["--model", "some/model"], "data: got none"),
        (["--data", "x", "--quick"], "suite, split, quick: got one with --data"),
        (["--data", "x", "--split", "other"], "suite, split, quick: got one with --data"),
        (["--variant", "nonsense"], "variant: got 'nonsense', expected one of ('vl_cache'"),
        (["--pages", "0"], "pages"),
        (["--data", "nofile"], "data: cannot read 'nofile': No such file"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(tmp_path, capsys, arguments, message):
    assert run(["eval", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "data: questions.jsonl, line 1: got no JSON"),
        ("", "data: questions.jsonl: got no question"),
        ("\n\n", "data: questions.jsonl: got no question"),
        (
            '{"image": "no.png", "question": "?", "answers": ["x"]}',
            "data: questions.jsonl, line 1: image: cannot read",
        ),
    ],
)
def test_a_bad_question_file_is_one_line(tmp_path, capsys, text, message):
    (tmp_path / "questions.jsonl").write_text(text)
    assert run(["eval", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
