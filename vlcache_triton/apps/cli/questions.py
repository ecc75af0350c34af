"""The questions that `eval` and `reproduce` ask: synthetic forms, or a user's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlcache_triton.apps.evaluation import (
    SUITES,
    Comparison,
    Item,
    Query,
    compare_all,
    encode_form,
    evaluate_item,
    form_item,
    read_items,
)
from vlcache_triton.apps.images import read_image

from .console import UserError, one_line
from .vlm import VisionLanguageModel

#: (suite, index, how to evaluate it).
Job = tuple[str, int, Callable[[], dict[str, Any]]]


@dataclass(frozen=True)
class Question:
    """One that is drawn or read, and encoded, when it is asked. suite, index: as an Item's."""

    suite: str
    index: int
    load: Callable[[], tuple[Item, Query]]


def questions_of(
    vlm: VisionLanguageModel,
    items: Sequence[Item],
    suites: Sequence[str],
    pages: int,
    split: str = "test",
) -> list[Question]:
    """A user's items where there are any, else synthetic forms, which any model can be shown."""
    if vlm.is_embedded:
        torch.set_num_threads(1)  # so small a model only waits for further threads
    if items:
        return list(own_questions(vlm, items))
    return list(form_questions(vlm, suites, pages, split))


def form_questions(
    vlm: VisionLanguageModel, suites: Sequence[str], pages: int, split: str
) -> Iterator[Question]:
    """Suites in turn, page by page, so that a run that is cut off has of each; another split is
    another set of pages."""
    chosen = [suite for suite in SUITES if suite.name in suites]

    def load(suite: Any, index: int) -> tuple[Item, Query]:
        item = form_item(suite, index, split)
        return item, encode_form(vlm.processor, item, vlm.model.device)

    for index in range(pages):
        for suite in chosen:
            yield Question(suite.name, index, functools.partial(load, suite, index))


def own_questions(vlm: VisionLanguageModel, items: Sequence[Item]) -> Iterator[Question]:
    """A user's."""

    def load(item: Item) -> tuple[Item, Query]:
        inputs = vlm.encode([read_image(image) for image in item.images], item.turns[0])
        return item, Query(dict(inputs), torch.empty(0, dtype=torch.int64))

    for item in items:
        yield Question(item.suite, item.index, functools.partial(load, item))


def own_items(data: Path, max_new_tokens: int) -> list[Item]:
    """Read and checked; what is wrong is named by file and line."""
    try:
        return read_items(data, max_new_tokens)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"data: cannot read {str(error.filename or data)!r}: {reason}") from error
    except ValueError as error:
        raise UserError(f"data: {one_line(str(error))}") from error


def evaluations(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    budgets: Sequence[float],
    compare: Comparison = compare_all,
) -> list[Job]:
    """How each question is evaluated, for `evaluation.run`."""

    def evaluate(question: Question) -> dict[str, Any]:
        item, query = question.load()
        return evaluate_item(vlm.model, vlm.processor, item, query, budgets, compare)

    return [(q.suite, q.index, functools.partial(evaluate, q)) for q in questions]
