"""`vlcache eval`, as a user runs it."""

import json

import pytest

from vlcache_triton.cli.app import run
from vlcache_triton.evaluation import SUITES, form_item
from vlcache_triton.formreader.model import WEIGHTS


def test_forms_are_evaluated_and_a_second_run_goes_on(tmp_path, capsys):
    command = ["eval", "--suite", "count", "--budget", "0.2", "--budget", "1", "--out"]
    assert run([*command, str(tmp_path / "out"), "--pages", "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["about"]["model"] == "form-reader"
    variants = {cell["variant"] for cell in summary["cells"]}
    assert {"full", "vl_cache", "tuned", "snapkv", "hindsight", "all rows, uniform"} <= variants
    first = (tmp_path / "out" / "results.jsonl").read_text()
    assert run([*command, str(tmp_path / "out"), "--pages", "2"]) == 0
    out = capsys.readouterr().out
    assert "Ablation" in out and "report.md" in out
    both = (tmp_path / "out" / "results.jsonl").read_text()
    assert both.startswith(first) and len(both.splitlines()) == 2
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"settings.json", "summary.json", "report.md", "count.png"} <= written
    assert run(["eval", "--suite", "count", "--budget", "0.3", "--out", str(tmp_path / "out")]) == 2
    assert "holds results of" in capsys.readouterr().err


def test_own_questions_about_own_images(tmp_path, capsys):
    item = form_item(next(s for s in SUITES if s.name == "value"), 0)
    item.images[0].save(tmp_path / "page.png")
    line = {"image": "page.png", "question": item.turns[0], "answers": list(item.answers)}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line))
    command = ["eval", "--model", str(WEIGHTS), "--data", str(tmp_path), "--max-new-tokens", "9"]
    assert run([*command, "--budget", "0.8", "--json", "--out", str(tmp_path / "out")]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    full = next(cell for cell in cells if cell["variant"] == "full")
    assert full["suite"] == "questions" and full["exact"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "nonsense"], "suite: got 'nonsense'"),
        (["--budget", "0"], "budget: got [0.0]"),
        (["--budget", "1.5"], "budget: got [1.5]"),
        (["--model", "some/model"], "data: got none"),
        (["--data", "x", "--quick"], "suite, quick: got one with --data"),
        (["--pages", "0"], "pages"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(tmp_path, capsys, arguments, message):
    assert run(["eval", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_bad_question_file_is_one_line(tmp_path, capsys):
    (tmp_path / "questions.jsonl").write_text("{")
    command = ["eval", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert run(command) == 2
    assert "questions.jsonl, line 1: got no JSON" in capsys.readouterr().err
