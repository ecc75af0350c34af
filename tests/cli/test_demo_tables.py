"""The demo's tables hold whatever is asked, and its last lines say what it comes to."""

import shlex

import pytest
from rich.cells import cell_len

from vlcache_triton.apps.cli.demo_tables import print_demo

RIGHT, WRONG = "AB12CD34", "AB12CD3"  # the longest value, and one cut off
NUM_LAYERS = 8


def result_of(full="", compressed="", budget=0.6, sweep=False):
    """A question for each character of the two: "+" a right answer, "-" a wrong one."""
    texts = ("What is the value of WUW?", "Which field comes after KAB?")
    answers = {"+": RIGHT, "-": WRONG}
    questions = [
        {
            "question": texts[i % 2],
            "expected": RIGHT,
            "full": {"answer": answers[a], "kv_bytes": 5_000_000, "seconds": 0.3},
            "compressed": {
                "answer": answers[b],
                "kv_bytes": int(5_000_000 * budget),
                "seconds": 0.4,
                "budget": budget,
                "kept": [300 + 10 * layer + i for layer in range(NUM_LAYERS)],
            },
        }
        for i, (a, b) in enumerate(zip(full, compressed, strict=True))
    ]
    result = {"page": "a page.png", "preset": "tuned", "questions": questions}
    if sweep:
        row = {"budget": 0.05, "right": 0, "same_as_full": len(full), "kv_bytes": 5_000_000}
        result["sweep"] = [row, {**row, "budget": 0.8}]
    return result


def lines_of(result, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    print_demo(result)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("num_questions", [1, 2, 9, 100])
@pytest.mark.parametrize("compressed", "+-")
def test_tables_hold(num_questions, columns, compressed, capsys, monkeypatch):
    """Nothing is cut, no line is too long, and the lines of a table end together."""
    result = result_of("+" * num_questions, compressed * num_questions, sweep=True)
    lines = lines_of(result, columns, capsys, monkeypatch)
    text = "\n".join(lines)
    assert "…" not in text
    assert all(cell_len(line) <= columns for line in lines if not line.startswith("vlcache "))
    widths, tables = set(), 0
    for line in lines:
        if line and line[0] in "┏┃┡│└":
            widths.add(cell_len(line))
        if line.startswith("└"):
            assert len(widths) == 1
            widths, tables = set(), tables + 1
    assert tables == 3
    assert text.count(f"{RIGHT} ✓") == num_questions * (2 if compressed == "+" else 1)
    assert text.count(f"{WRONG} ✗ ({RIGHT})") == (0 if compressed == "+" else num_questions)
    for layer in range(NUM_LAYERS):
        first, last = 300 + 10 * layer, 299 + 10 * layer + num_questions
        shown = str(first) if num_questions == 1 else f"{first} to {last}"
        assert any(f" {layer} │" in line and f" {shown} │" in line for line in lines)


@pytest.mark.parametrize(
    ("full", "compressed", "cost"),
    [
        ("+++", "+++", "It cost no right answer."),
        ("+++", "+-+", "It cost 1 of 3 right answers."),
        ("-++", "---", "It cost 2 of 2 right answers."),
        ("--", "--", "It cost no right answer."),
        (
            "-++",
            "++-",
            "It cost 1 of 2 right answers, and 1 wrong with the full cache came out right.",
        ),
    ],
)
def test_what_was_saved_and_what_it_cost(full, compressed, cost, capsys, monkeypatch):
    lines = lines_of(result_of(full, compressed), 300, capsys, monkeypatch)
    (summary,) = [line for line in lines if line.startswith("Saved ")]
    saved = "Saved 40% of the prompt's KV cache: 3 MB a question instead of 5 MB."
    assert summary == f"{saved} {cost} A question took 0.40 s instead of 0.30 s."


def test_a_budget_of_1_saves_nothing_and_is_not_inspected(capsys, monkeypatch):
    lines = lines_of(result_of("+", "+", budget=1.0), 200, capsys, monkeypatch)
    assert any(line.startswith("Nothing saved: the prompt's KV cache is 5 MB") for line in lines)
    (command,) = [line for line in lines if line.startswith("vlcache inspect ")]
    assert "--budget" not in command


@pytest.mark.parametrize("sweep", [False, True])
def test_how_to_go_on(sweep, capsys, monkeypatch):
    """A sweep is not offered to who has just seen one; the command is one line, to be copied."""
    lines = lines_of(result_of("+", "+", sweep=sweep), 60, capsys, monkeypatch)
    start = next(i for i, line in enumerate(lines) if line.startswith("Go on with"))
    assert "--budget" in lines[start]
    assert ("--sweep" in " ".join(lines[start:])) is not sweep
    (command,) = [line for line in lines if line.startswith("vlcache inspect ")]
    assert shlex.split(command)[2:] == [
        *("--image", "a page.png", "--prompt", "What is the value of WUW?"),
        *("--budget", "0.6", "--preset", "tuned", "--out", "vlcache-report"),
    ]
