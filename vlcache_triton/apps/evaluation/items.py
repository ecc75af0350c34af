"""The questions that are asked: fixed synthetic forms, or a user's own images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlcache_triton.apps.chat import chat
from vlcache_triton.apps.formreader import Task, draw_dialogue, encode_chats, render
from vlcache_triton.apps.images import read_image

from .recording import Query


@dataclass(frozen=True)
class Suite:
    """A kind of question about synthetic forms. tasks: of the turns; the last one's answer counts,
    and the turns before it are answered as they should be. max_new_tokens: the longest right
    answer and its end; a token is a character."""

    name: str
    tasks: tuple[Task, ...]
    max_new_tokens: int
    num_pages: int = 1


#: value: 8 characters; field and next: a key of 3 letters or "none"; list: 10 keys and spaces.
SUITES = (
    Suite("value", ("value",), 9),
    Suite("field", ("field",), 5),
    Suite("count", ("count",), 3),
    Suite("next", ("next",), 5),
    Suite("list", ("list",), 40),
    Suite("value, 2 images", ("value",), 9, num_pages=2),
    Suite("value, 3 turns", ("value", "value", "value"), 9),
)


@dataclass(frozen=True)
class Item:
    """A question. suite: what it is counted under; index: which one of the suite; images: pictures,
    or the files that hold them (read_image takes both); turns: the questions so far; replies: to
    all but the last; answers: any is right."""

    suite: str
    index: int
    images: list[Any]
    turns: tuple[str, ...]
    replies: tuple[str, ...]
    answers: tuple[str, ...]
    max_new_tokens: int


def form_item(suite: Suite, index: int, split: str = "test") -> Item:
    """Question `index` of a suite; another split is another set of pages. Always the same."""
    seed = f"{split}-{suite.name}-{index}"
    dialogue = draw_dialogue(seed, suite.tasks, num_pages=suite.num_pages)
    return Item(
        suite.name,
        index,
        [render(page) for page in dialogue.pages],
        tuple(question.text for question in dialogue.questions),
        tuple(question.answer for question in dialogue.questions[:-1]),
        (dialogue.questions[-1].answer,),
        suite.max_new_tokens,
    )


def encode_form(processor: Any, item: Item, device: torch.device) -> Query:
    """A form item for the embedded model: its first turn, and the later ones as continuation."""
    first = encode_chats(processor, [chat(item.images, item.turns[:1])])
    whole = chat(item.images, item.turns, item.replies)
    ids = encode_chats(processor, [whole])["input_ids"][0]
    length = first["input_ids"].shape[1]
    if not torch.equal(ids[:length], first["input_ids"][0]):
        raise RuntimeError("the chat template does not put later turns behind the first")
    return Query(dict(first.to(device)), ids[length:])


def read_items(path: Path, max_new_tokens: int) -> list[Item]:
    """A user's own questions, from JSON Lines: {"image": ..., "question": ..., "answers": [...]}.

    Every image is read once, to see that it can be, and let go of again.

    Args:
        path: the file, or a folder with a `questions.jsonl`. An image (or a list of them) is named
            relative to it.

    Raises:
        ValueError: naming the line and what is wrong with it, or where there is no question.
        OSError: where the file of questions cannot be read.
    """
    path = path / "questions.jsonl" if path.is_dir() else path
    items: list[Item] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        names, question, answers = _read_line(place, line)
        images = [path.parent / name for name in names]
        for image in images:
            try:
                read_image(image)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        items.append(Item(path.stem, number - 1, images, (question,), (), answers, max_new_tokens))
    if not items:
        raise ValueError(f"{path.name}: got no question, expected an object a line")
    return items


def _read_line(place: str, line: str) -> tuple[Sequence[str], str, tuple[str, ...]]:
    """(image names, question, answers) of one line."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: got no JSON ({error}), expected an object a line") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: got {type(entry).__name__}, expected an object")
    images = entry.get("image")
    images = [images] if isinstance(images, str) else images
    question, answers = entry.get("question"), entry.get("answers")
    if not _are_texts(images):
        raise ValueError(
            f"{place}: image: got {entry.get('image')!r}, expected a file name or more"
        )
    if not isinstance(question, str) or not question:
        raise ValueError(f"{place}: question: got {question!r}, expected a text")
    if not _are_texts(answers):
        raise ValueError(f"{place}: answers: got {answers!r}, expected a list of texts")
    assert images is not None and answers is not None
    return images, question, tuple(answers)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)
