"""Questions about forms, with their answers, and the dialogues they make up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from .pages import Page, draw_pages

Task = Literal["value", "field", "count", "next", "list"]
TASKS: tuple[Task, ...] = get_args(Task)
MAX_LISTED = 10  # keys in the answer to "list"
MAX_ANSWER_TOKENS = 4 * MAX_LISTED  # the longest answer and its end; a token is a character


@dataclass(frozen=True)
class Question:
    """A question in the words that the model was trained on, and its one right answer."""

    task: Task
    text: str
    answer: str


@dataclass(frozen=True)
class Dialogue:
    """The pages of one document and the questions asked about them, turn by turn."""

    pages: tuple[Page, ...]
    questions: tuple[Question, ...]


def ask(rng: Random, pages: Sequence[Page], tasks: Sequence[Task]) -> tuple[Question, ...]:
    """One question a task about the document `pages`, whose fields are in reading order.

    No field is asked about twice while there are others. Several pages read as one: they count
    together, and the first field of a page comes after the last of the page before it.

    Raises:
        ValueError: for an unknown task.
    """
    unknown = set(tasks) - set(TASKS)
    if unknown:
        raise ValueError(f"tasks: got {sorted(unknown)}, expected some of {TASKS}")
    fields = [field for page in pages for field in page.fields]
    order = rng.sample(range(len(fields)), len(fields))
    questions = []
    for turn, task in enumerate(tasks):
        index = order[turn % len(order)]
        key, value = fields[index].key, fields[index].value
        if task == "value":
            text, answer = f"What is the value of {key}?", value
        elif task == "field":
            text, answer = f"Which field has the value {value}?", key
        elif task == "count":
            text, answer = "How many fields are there?", str(len(fields))
        elif task == "next":
            text = f"Which field comes after {key}?"
            answer = fields[index + 1].key if index + 1 < len(fields) else "none"
        else:
            text = "List the fields of this form."
            answer = " ".join(field.key for field in fields[:MAX_LISTED])
        questions.append(Question(task, text, answer))
    return tuple(questions)


def draw_dialogue(
    seed: int | str,
    tasks: Sequence[Task],
    *,
    num_pages: int = 1,
    fields: tuple[int, int] = (6, 12),
    clutter: float = 0.5,
) -> Dialogue:
    """The fixed dialogue of a seed: a document of `num_pages` and one question a task about it."""
    rng = Random(seed)
    pages = draw_pages(rng, num_pages, fields=fields, clutter=clutter)
    return Dialogue(pages, ask(rng, pages, tasks))
