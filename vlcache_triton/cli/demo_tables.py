"""What `vlcache demo` prints: the same dictionary that --json writes, as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .console import bar, size


def print_demo(result: dict[str, Any]) -> None:
    """Print the answers, the kept tokens by layer, the sweep where there is one, and the page."""
    console = Console()
    console.print(_answers(result["questions"]))
    console.print(_kept(result["questions"]))
    if "sweep" in result:
        console.print(_sweep(result["sweep"], len(result["questions"])))
    console.print(f"The page: {result['page']}", markup=False, highlight=False)


def _answers(questions: list[dict[str, Any]]) -> Table:
    budget = f"{questions[0]['compressed']['budget']:.0%}"
    table = Table(title=f"The full KV cache, and {budget} of it")
    table.add_column("question")
    for cache in ("full", budget):
        table.add_column(f"answer\n{cache}")
    for quantity in ("KV", "time"):
        for cache in ("full", budget):
            table.add_column(f"{quantity}\n{cache}", justify="right", no_wrap=True)
    for each in questions:
        full, compressed = each["full"], each["compressed"]
        table.add_row(
            Text(each["question"]),
            _judged(full["answer"], each["expected"]),
            _judged(compressed["answer"], each["expected"]),
            size(full["kv_bytes"]),
            size(compressed["kv_bytes"]),
            f"{full['seconds']:.2f} s",
            f"{compressed['seconds']:.2f} s",
        )
    return table


def _judged(answer: str, expected: str) -> Text:
    if answer == expected:
        return Text(f"{answer} ✓", style="green")
    return Text(f"{answer} ✗ ({expected})", style="red")


def _kept(questions: list[dict[str, Any]]) -> Table:
    kept = [each["compressed"]["kept"] for each in questions]  # [questions][layers]
    num_layers = len(kept[0])
    most = max(map(max, kept))
    table = Table(title="Prompt tokens that each KV head keeps")
    table.add_column("layer", justify="right")
    for i in range(len(kept)):
        table.add_column(f"q{i + 1}", justify="right")
    table.add_column("mean, to scale")
    for layer in range(num_layers):
        counts = [row[layer] for row in kept]
        mean = sum(counts) / len(counts)
        table.add_row(str(layer), *map(str, counts), bar(mean / most))
    return table


def _sweep(rows: list[dict[str, Any]], num_questions: int) -> Table:
    table = Table(title=f"Where the answers break ({num_questions} questions)")
    for heading in ("budget", "right", "as with the full cache", "KV cache"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            f"{row['budget']:.0%}",
            str(row["right"]),
            str(row["same_as_full"]),
            size(row["kv_bytes"]),
            bar(row["same_as_full"] / num_questions),
        )
    return table
