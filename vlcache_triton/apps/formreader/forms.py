"""A page laid out as forms are: room for a title, fields in columns, small print.

The same words in the same cells as `draw_pages` has them, so that the model can read it; what makes
it look like a form is `render_form`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from random import Random

from .pages import GRID_SIZE, MAX_FIELDS, WORD_LENGTH, Page, draw_fields, write_field
from .questions import Dialogue, Task, ask

TITLE_ROW = 1  # of the header's
HEADER_ROWS = 4  # a title, a line of small print, and blank ones round them
FOOTER_ROWS = 4  # left free for small print, but on a full page
#: The labels' columns, which are among those that the model saw, and the rows from line to line.
LAYOUTS = (((4, 16), 3), ((4, 16), 2), ((1, 9, 17), 2), ((1, 9, 17), 1), ((0, 4, 8, 12, 16, 20), 1))
MARGIN = 2  # cells left and right of the small print

#: In words that alternate consonants and vowels, as all clutter does: "the" and "and", which the
#: model has not learned to pass over, are kept through compression like keys.
SMALL_PRINT = (
    "come to gate five for more",
    "do not cut do not tape do take care",
    "we have ten more for sale",
    "note time here date here",
    "we take no fine for late date",
)


def draw_form(seed: int | str, tasks: Sequence[Task], num_fields: int) -> Dialogue:
    """The fixed dialogue of a seed about one such page, with one question a task.

    Fields are in reading order, line by line. Where they leave no room, header and small print go.

    Raises:
        ValueError: naming the argument, what was got and what was expected.
    """
    if not 1 <= num_fields <= MAX_FIELDS:
        raise ValueError(f"num_fields: got {num_fields}, expected an int in [1, {MAX_FIELDS}]")
    rng = Random(seed)
    fields = draw_fields(rng, num_fields)
    cells = [[""] * GRID_SIZE for _ in range(GRID_SIZE)]
    top = HEADER_ROWS
    for columns, step in LAYOUTS:
        bottom = top + ceil(num_fields / len(columns)) * step
        if bottom <= GRID_SIZE - FOOTER_ROWS * (step > 1):
            break
    else:
        top, bottom = 0, GRID_SIZE
    for i, field in enumerate(fields):
        line, place = divmod(i, len(columns))
        write_field(cells, top + line * step, columns[place], field)
    print_rows = ([HEADER_ROWS - 2] if top else []) + list(range(bottom + 1, GRID_SIZE - 1))
    for row, text in zip(print_rows, rng.sample(SMALL_PRINT, len(SMALL_PRINT)), strict=False):
        _print(cells[row], text)
    page = Page(tuple(map(tuple, cells)), tuple(fields))
    return Dialogue((page,), ask(rng, [page], tasks))


def _print(row: list[str], text: str) -> None:
    """A word a cell; a blank cell behind a word that fills its own."""
    column = MARGIN
    for word in text.split():
        row[column] = word
        column += 2 if len(word) == WORD_LENGTH else 1
