"""Synthetic forms: a grid of words in which some cells are `KEY:` and the next ones their value.

The grid is the vision tower's: a cell is one patch, so one visual token carries one whole word, as
a visual token does on a dense document at the resolution of a large model.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

GRID_SIZE = 24  # cells a side
WORD_LENGTH = 4  # characters a cell holds
SLOT_WIDTH = 4  # columns a field takes: one of shift, its key, one or two of value

CONSONANTS = "BCDFGHJKLMNPRSTVWZ"
VOWELS = "AEIOU"
KEYS = tuple(a + b + c for a in CONSONANTS for b in VOWELS for c in CONSONANTS)
ALPHANUMERIC = string.ascii_uppercase + string.digits
MAX_FIELDS = GRID_SIZE * (GRID_SIZE // SLOT_WIDTH)  # of one page
LONG_VALUE_SHARE = 0.2  # values of two cells, 5 to 8 characters


@dataclass(frozen=True)
class Field:
    """An entry of a form: a key of three letters, a value of one to eight letters and digits."""

    key: str
    value: str


@dataclass(frozen=True)
class Page:
    """A form: `cells[row][column]` is a word of up to four characters; fields in reading order."""

    cells: tuple[tuple[str, ...], ...]
    fields: tuple[Field, ...]


def draw_pages(
    rng: Random,
    num_pages: int = 1,
    *,
    fields: tuple[int, int] = (6, 12),
    clutter: float = 0.5,
    rows: range = range(GRID_SIZE),
) -> tuple[Page, ...]:
    """Draw the pages of one document; no key and no value occurs twice in it.

    Args:
        rng: the only source of chance: the same state draws the same pages.
        num_pages: pages of the document, at least 1.
        fields: fewest and most fields of a page, both included, in [1, MAX_FIELDS].
        clutter: share of the rows that hold lower-case words between the fields, in [0, 1].
        rows: those that hold anything, of the GRID_SIZE; the others stay blank.

    Raises:
        ValueError: naming the argument, what was got and what was expected.
    """
    low, high = fields
    if num_pages < 1:
        raise ValueError(f"num_pages: got {num_pages}, expected an int >= 1")
    if not 1 <= low <= high <= MAX_FIELDS or high * num_pages > len(KEYS):
        raise ValueError(f"fields: got {fields}, expected 1 <= low <= high <= {MAX_FIELDS}")
    if not set(rows) <= set(range(GRID_SIZE)) or high > len(rows) * (GRID_SIZE // SLOT_WIDTH):
        raise ValueError(f"rows: got {rows} for {high} fields, expected enough of {GRID_SIZE}")
    if not 0 <= clutter <= 1:
        raise ValueError(f"clutter: got {clutter}, expected a share in [0, 1]")
    counts = [rng.randint(low, high) for _ in range(num_pages)]
    entries = iter(draw_fields(rng, sum(counts)))
    return tuple(_page(rng, [next(entries) for _ in range(n)], clutter, rows) for n in counts)


def draw_fields(rng: Random, num_fields: int) -> list[Field]:
    """Fields of one document: no key and no value occurs twice."""
    keys = rng.sample(KEYS, num_fields)
    values: dict[str, None] = {}  # a set that keeps its order
    while len(values) < len(keys):
        values[_value(rng)] = None
    return [Field(key, value) for key, value in zip(keys, values, strict=True)]


def _page(rng: Random, fields: list[Field], clutter: float, rows: range) -> Page:
    cells = [[""] * GRID_SIZE for _ in range(GRID_SIZE)]
    taken: set[tuple[int, int]] = set()  # cells of fields and the one behind each
    columns = range(0, GRID_SIZE, SLOT_WIDTH)
    slots = rng.sample([(row, column) for row in rows for column in columns], len(fields))
    for field, (row, slot) in zip(fields, sorted(slots), strict=True):
        column = slot + rng.randint(0, 1)
        write_field(cells, row, column, field)
        taken.update((row, column + offset) for offset in range(SLOT_WIDTH))
    for row in rows:
        if rng.random() < clutter:
            for column, word in _clutter(rng):
                if (row, column) not in taken:
                    cells[row][column] = word
    return Page(tuple(map(tuple, cells)), tuple(fields))


def write_field(cells: list[list[str]], row: int, column: int, field: Field) -> None:
    """Put a field into its three cells of a row: the key, and the value's two halves."""
    words = [field.key + ":", field.value[:WORD_LENGTH], field.value[WORD_LENGTH:]]
    cells[row][column : column + len(words)] = words


def _clutter(rng: Random) -> Iterator[tuple[int, str]]:
    """Columns and lower-case words of one row, from a random indent to a random end."""
    for column in range(rng.randint(0, 6), GRID_SIZE):
        if rng.random() < 0.12:
            return
        if rng.random() < 0.8:
            letters = (rng.choice((CONSONANTS, VOWELS)[i % 2]) for i in range(rng.randint(2, 4)))
            yield column, "".join(letters).lower()


def _value(rng: Random) -> str:
    def letters(n: int) -> str:
        return "".join(rng.choice(rng.choice((string.digits, ALPHANUMERIC))) for _ in range(n))

    if rng.random() < LONG_VALUE_SHARE:
        return letters(WORD_LENGTH) + letters(rng.randint(1, WORD_LENGTH))
    return letters(rng.randint(1, WORD_LENGTH))
