"""Questions have the answers that the fields give."""

from random import Random

import pytest

from vlcache_triton.apps.formreader import (
    MAX_ANSWER_TOKENS,
    TASKS,
    Field,
    Page,
    ask,
    chat,
    draw_dialogue,
    draw_pages,
)

PAGES = (
    Page(cells=(), fields=(Field("KAB", "7F3"), Field("LOT", "41"))),
    Page(cells=(), fields=(Field("ZEG", "0041A"),)),
)


@pytest.mark.parametrize("seed", range(6))
def test_each_task_asks_about_the_document_as_a_whole(seed):
    keys = ["KAB", "LOT", "ZEG"]
    values = dict(zip(keys, ["7F3", "41", "0041A"], strict=True))
    following = dict(zip(keys, ["LOT", "ZEG", "none"], strict=True))
    value, field, count, after, listed = ask(Random(seed), PAGES, TASKS)
    key = value.text.removeprefix("What is the value of ").removesuffix("?")
    assert value.answer == values[key]
    asked = field.text.removeprefix("Which field has the value ").removesuffix("?")
    assert values[field.answer] == asked
    assert (count.text, count.answer) == ("How many fields are there?", "3")
    key = after.text.removeprefix("Which field comes after ").removesuffix("?")
    assert after.answer == following[key]
    assert (listed.text, listed.answer) == ("List the fields of this form.", "KAB LOT ZEG")


def test_no_field_is_asked_about_twice_while_there_are_others():
    texts = [question.text for question in ask(Random(1), PAGES, ["value"] * 6)]
    assert len(set(texts[:3])) == 3
    assert texts[3:] == texts[:3]


def test_a_list_stops_at_ten_keys_and_is_the_longest_answer():
    pages = draw_pages(Random(0), fields=(14, 14))
    (question,) = ask(Random(0), pages, ["list"])
    assert question.answer.split() == [field.key for field in pages[0].fields[:10]]
    assert len(question.answer) + 1 == MAX_ANSWER_TOKENS


def test_a_seed_is_a_dialogue():
    dialogue = draw_dialogue("x", ("value", "next", "list"), num_pages=2, fields=(3, 5))
    assert dialogue == draw_dialogue("x", ("value", "next", "list"), num_pages=2, fields=(3, 5))
    assert dialogue != draw_dialogue("y", ("value", "next", "list"), num_pages=2, fields=(3, 5))
    assert len(dialogue.pages) == 2
    assert [question.task for question in dialogue.questions] == ["value", "next", "list"]


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"^tasks: got \['summary'\], expected"):
        ask(Random(0), PAGES, ["value", "summary"])


def test_a_chat_shows_the_images_in_its_first_turn():
    messages = chat(["page 1", "page 2"], ["a?", "b?"], ["1"])
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"] == [
        {"type": "image", "image": "page 1"},
        {"type": "image", "image": "page 2"},
        {"type": "text", "text": "a?"},
    ]
    assert messages[1]["content"] == [{"type": "text", "text": "1"}]
    assert messages[2]["content"] == [{"type": "text", "text": "b?"}]
    with pytest.raises(ValueError, match=r"^answers: got 0, expected 1"):
        chat([], ["a?", "b?"])
