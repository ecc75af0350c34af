"""Pages hold what their fields say, and are the same everywhere and always."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_triton.apps.formreader import Field, draw_pages
from vlcache_triton.apps.formreader.pages import GRID_SIZE, MAX_FIELDS, WORD_LENGTH


def read_back(page):
    """The fields by the rule a reader goes by: `KEY:`, then its value in upper case."""
    found = []
    for words in page.cells:
        for column, word in enumerate(words):
            if word.endswith(":"):
                first, second = words[column + 1], words[column + 2]
                found.append(Field(word[:-1], first + (second if second == second.upper() else "")))
    return tuple(found)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_pages=st.integers(1, 3),
    fields=st.tuples(st.integers(1, MAX_FIELDS), st.integers(1, MAX_FIELDS)).map(sorted),
    clutter=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_cells_hold_the_fields_and_nothing_is_said_twice(seed, num_pages, fields, clutter):
    low, high = fields
    pages = draw_pages(Random(seed), num_pages, fields=(low, high), clutter=clutter)
    assert len(pages) == num_pages
    for page in pages:
        assert low <= len(page.fields) <= high
        assert read_back(page) == page.fields
        assert [len(words) for words in page.cells] == [GRID_SIZE] * GRID_SIZE
        assert max(len(word) for words in page.cells for word in words) <= WORD_LENGTH
    entries = [field for page in pages for field in page.fields]
    assert len({field.key for field in entries}) == len(entries)
    assert len({field.value for field in entries}) == len(entries)


def test_clutter_is_a_share_of_the_rows():
    def cluttered(share):
        (page,) = draw_pages(Random(0), fields=(1, 1), clutter=share)
        return sum(any(word.islower() for word in words) for words in page.cells)

    assert cluttered(0.0) == 0
    assert 5 <= cluttered(0.5) <= 15  # a row that has words ends before the first one 12 % of times
    assert cluttered(1.0) > 16


def test_a_seed_draws_the_same_page_on_every_python():
    (page,) = draw_pages(Random("page-0"), fields=(6, 6))
    again = draw_pages(Random("page-0"), fields=(6, 6))
    assert again == (page,)
    assert page.fields == PAGE_0


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("num_pages", {"num_pages": 0}),
        ("fields", {"fields": (0, 4)}),
        ("fields", {"fields": (5, 4)}),
        ("fields", {"fields": (5, MAX_FIELDS + 1)}),
        ("fields", {"num_pages": 12, "fields": (5, MAX_FIELDS)}),
        ("clutter", {"clutter": 1.5}),
    ],
)
def test_a_bad_argument_is_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: got "):
        draw_pages(Random(0), **arguments)


PAGE_0 = (
    Field("TIJ", "5H8MEL8"),
    Field("WER", "50R"),
    Field("PEW", "ON14B1"),
    Field("PAG", "5U4AO"),
    Field("NEC", "847O99"),
    Field("GOT", "C"),
)
