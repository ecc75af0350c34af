"""What `vlcache demo` prints: the same dictionary that --json writes, as tables and in words."""

from __future__ import annotations

import shlex
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from .console import bar, count, right, size

CACHES = ("full", "compressed")
ANSWER_WIDTH = 10  # a value of eight characters, a blank and the mark


def print_demo(result: dict[str, Any]) -> None:
    """Print the answers, the kept tokens by layer, the sweep where there is one, and what it comes
    to. Holds for any number of questions, and at 60 columns."""
    console = Console(highlight=False)
    questions = result["questions"]
    console.print(_answers(questions))
    console.print(_kept(questions))
    if "sweep" in result:
        console.print(_sweep(result["sweep"], len(questions)))
    console.print(f"{_saved(questions)} {_cost(questions)}", markup=False)
    sweep = "" if "sweep" in result else "with --sweep, "
    console.print(f"Go on with another --budget, {sweep}or see what is kept of the page:")
    # To be copied, so without line breaks.
    console.print(_inspect(result), markup=False, soft_wrap=True)
    console.print(f"The page: {result['page']}", markup=False, soft_wrap=True)


def _answers(questions: list[dict[str, Any]]) -> Table:
    budget = f"{questions[0]['compressed']['budget']:.3g}"
    columns = (Column(x, min_width=ANSWER_WIDTH) for x in ("full", f"budget {budget}"))
    title = "Answers from the full KV cache, and from a part of it"
    table = Table("question", *columns, title=title)
    for each in questions:
        answers = (_judged(each[cache]["answer"], each["expected"]) for cache in CACHES)
        table.add_row(Text(each["question"]), *answers)
    return table


def _judged(answer: str, expected: str) -> Text:
    if answer == expected:
        return Text(f"{answer} ✓", style="green")
    return Text(f"{answer} ✗ ({expected})", style="red")


def _kept(questions: list[dict[str, Any]]) -> Table:
    kept = [each["compressed"]["kept"] for each in questions]  # [questions][layers]
    layers = list(zip(*kept, strict=True))
    most = max(map(mean, layers))
    tokens = [right("tokens")] if len(kept) == 1 else [right("mean"), right("by question")]
    columns = (right("layer"), *tokens, Column("to scale", no_wrap=True))
    table = Table(*columns, title="Prompt tokens that each KV head keeps")
    for layer, counts in enumerate(layers):
        spread = [f"{min(counts)} to {max(counts)}"] if len(kept) > 1 else []
        middle = mean(counts)
        table.add_row(str(layer), f"{middle:.0f}", *spread, bar(middle / most))
    return table


def _sweep(rows: list[dict[str, Any]], num_questions: int) -> Table:
    table = Table(title=f"Where the answers break ({count(num_questions, 'question')})")
    for heading in ("budget", "right", "as full", "KV cache"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("as full, to scale", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['budget']:.0%}",
            str(row["right"]),
            str(row["same_as_full"]),
            size(row["kv_bytes"]),
            bar(row["same_as_full"] / num_questions),
        )
    return table


def _saved(questions: list[dict[str, Any]]) -> str:
    before, after = (mean(each[cache]["kv_bytes"] for each in questions) for cache in CACHES)
    if after >= before:
        return f"Nothing saved: the prompt's KV cache is {size(before)} either way."
    return (
        f"Saved {1 - after / before:.0%} of the prompt's KV cache: {size(after)} a question"
        f" instead of {size(before)}."
    )


def _cost(questions: list[dict[str, Any]]) -> str:
    right = [[each[cache]["answer"] == each["expected"] for each in questions] for cache in CACHES]
    lost = sum(full and not part for full, part in zip(*right, strict=True))
    gained = sum(part and not full for full, part in zip(*right, strict=True))
    cost = f"{lost} of {sum(right[0])} right answers" if lost else "no right answer"
    if gained:
        cost += f", and {gained} wrong with the full cache came out right"
    full, part = (mean(each[cache]["seconds"] for each in questions) for cache in CACHES)
    return f"It cost {cost}. A question took {part:.2f} s instead of {full:.2f} s."


def _inspect(result: dict[str, Any]) -> str:
    """The command that shows what was kept for the first question."""
    first = result["questions"][0]
    budget = first["compressed"]["budget"]
    share = ["--budget", f"{budget:g}"] if budget < 1 else []  # 1 keeps all: nothing to inspect
    preset = ["--preset", result["preset"]] if result["preset"] != "paper" else []
    what = ["--image", result["page"], "--prompt", first["question"], *share, *preset]
    return shlex.join(["vlcache", "inspect", *what, "--out", "vlcache-report"])
