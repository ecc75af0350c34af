"""The questions: fixed forms, and a user's own file with its mistakes."""

import json

import pytest
from PIL import Image

from vlcache_triton.apps.evaluation import SUITES, encode_form, form_item, read_items

SUITE = {suite.name: suite for suite in SUITES}


def write(folder, *lines):
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "questions.jsonl").write_text(text)
    return folder


GOOD = {"image": "a.png", "question": "What?", "answers": ["this", "that"]}


@pytest.mark.parametrize("suite", SUITES, ids=[s.name for s in SUITES])
def test_a_form_item_is_always_the_same(suite):
    first, second = form_item(suite, 3), form_item(suite, 3)
    assert (first.turns, first.replies, first.answers) == (
        second.turns,
        second.replies,
        second.answers,
    )
    pairs = zip(first.images, second.images, strict=True)
    assert all(a.tobytes() == b.tobytes() for a, b in pairs)
    assert len(first.images) == suite.num_pages
    assert len(first.turns) == len(first.replies) + 1 == len(suite.tasks)
    assert len(first.answers[0]) < suite.max_new_tokens  # its end token fits, too


def test_items_and_splits_differ():
    suite = SUITE["value"]
    seen = {form_item(suite, i, split).images[0].tobytes() for i in (0, 1) for split in ("a", "b")}
    assert len(seen) == 4


def test_later_turns_are_the_continuation(form_reader):
    model, processor = form_reader
    item = form_item(SUITE["value, 3 turns"], 0)
    query = encode_form(processor, item, model.device)
    text = processor.decode(query.continuation)
    expected = "".join(
        f"{reply}</s>USER: {turn} ASSISTANT: "
        for reply, turn in zip(item.replies, item.turns[1:], strict=True)
    )
    assert text == expected
    prompt = processor.decode(query.inputs["input_ids"][0, -20:])
    assert prompt.endswith(f"{item.turns[0][-5:]} ASSISTANT: ")
    single = encode_form(processor, form_item(SUITE["value"], 0), model.device)
    assert len(single.continuation) == 0


def test_own_items_are_read(tmp_path):
    several = GOOD | {"image": ["a.png", "a.png"]}
    items = read_items(write(tmp_path, GOOD, "", several), 7)
    assert [item.index for item in items] == [0, 2]
    assert [len(item.images) for item in items] == [1, 2]
    assert items[0].turns == ("What?",) and items[0].answers == ("this", "that")
    assert items[0].max_new_tokens == 7 and items[0].suite == "questions"
    by_name = read_items(tmp_path / "questions.jsonl", 7)
    assert [item.turns for item in by_name] == [item.turns for item in items]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: got no JSON"),
        ("[1]", "line 2: got list, expected an object"),
        (GOOD | {"image": 3}, "line 2: image: got 3"),
        (GOOD | {"image": []}, r"line 2: image: got \[\]"),
        (GOOD | {"question": ""}, "line 2: question: got ''"),
        (GOOD | {"answers": "this"}, "line 2: answers: got 'this'"),
        (GOOD | {"answers": []}, r"line 2: answers: got \[\]"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_items(write(tmp_path, GOOD, line), 7)


@pytest.mark.parametrize("name", ["missing.png", "questions.jsonl"])
def test_an_image_that_cannot_be_read_is_named_with_its_line(tmp_path, name):
    with pytest.raises(ValueError, match=rf"line 2: image: cannot read '.*{name}': "):
        read_items(write(tmp_path, GOOD, GOOD | {"image": ["a.png", name]}), 7)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_questions(tmp_path, text):
    with pytest.raises(ValueError, match=r"^questions\.jsonl: got no question"):
        read_items(write(tmp_path, text), 7)


def test_marks_that_editors_leave(tmp_path):
    """A byte order mark, carriage returns, and what Python alone takes for the end of a line."""
    line = json.dumps(GOOD | {"question": "One\u2028two?"}, ensure_ascii=False)
    write(tmp_path)
    (tmp_path / "questions.jsonl").write_bytes(f"\ufeff{line}\r\n{line}\r\n".encode())
    assert [item.turns for item in read_items(tmp_path, 7)] == [("One\u2028two?",)] * 2
