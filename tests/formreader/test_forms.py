"""A form's page: fields in columns, in reading order, and words where the model expects them."""

from itertools import pairwise

import pytest

from vlcache_triton.apps.formreader import draw_form
from vlcache_triton.apps.formreader.forms import HEADER_ROWS, SMALL_PRINT
from vlcache_triton.apps.formreader.pages import (
    CONSONANTS,
    GRID_SIZE,
    MAX_FIELDS,
    VOWELS,
    WORD_LENGTH,
)


def labels(page):
    """(row, column, key) of each field, in reading order."""
    return [
        (row, column, word[:-1])
        for row, words in enumerate(page.cells)
        for column, word in enumerate(words)
        if word.endswith(":")
    ]


@pytest.mark.parametrize("num_fields", [1, 2, 7, 8, 9, 16, 17, 30, 31, 60, 61, 120, 121, 144])
def test_fields_stand_in_columns_with_their_values_behind(num_fields):
    (page,) = draw_form("form", ["value"], num_fields).pages
    found = labels(page)
    assert [key for _, _, key in found] == [field.key for field in page.fields]
    assert len(found) == num_fields
    for (row, column, _), field in zip(found, page.fields, strict=True):
        assert "".join(page.cells[row][column + 1 : column + 3]) == field.value
    columns = sorted({column for _, column, _ in found})
    steps = {right - left for left, right in pairwise(columns)}
    assert len(columns) <= 6 and len(steps) <= 1 and min(steps, default=4) >= 4
    rows = sorted({row for row, _, _ in found})
    assert len({below - row for row, below in pairwise(rows)}) <= 1
    assert [len(words) for words in page.cells] == [GRID_SIZE] * GRID_SIZE
    assert max(len(word) for words in page.cells for word in words) <= WORD_LENGTH


def test_header_and_small_print_go_where_fields_leave_no_room():
    def blank_header(num_fields):
        (page,) = draw_form("form", ["value"], num_fields).pages
        return [not any(words) for words in page.cells[:HEADER_ROWS]]

    assert blank_header(120) == [True, True, False, True]
    assert blank_header(121) == [False] * HEADER_ROWS


def test_small_print_shares_no_row_with_fields_and_is_whole():
    (page,) = draw_form("form", ["value"], 8).pages
    printed = [
        " ".join(filter(None, words)) for words in page.cells if any(map(str.islower, words))
    ]
    assert len(printed) == 5 and sorted(printed) == sorted(SMALL_PRINT)


def test_small_print_is_of_the_words_that_the_model_passes_over():
    """Two to four letters that alternate, as in the clutter of its training pages."""
    for word in " ".join(SMALL_PRINT).upper().split():
        assert 2 <= len(word) <= WORD_LENGTH
        assert all(c in (CONSONANTS, VOWELS)[i % 2] for i, c in enumerate(word)), word


def test_a_seed_draws_the_same_form():
    assert draw_form(3, ["value", "next"], 8) == draw_form(3, ["value", "next"], 8)
    assert draw_form(3, ["value"], 8) != draw_form(4, ["value"], 8)


@pytest.mark.parametrize("num_fields", [0, MAX_FIELDS + 1])
def test_a_bad_number_of_fields_is_named(num_fields):
    with pytest.raises(ValueError, match=f"^num_fields: got {num_fields}"):
        draw_form(0, ["value"], num_fields)
