"""Draw a form as the image that the form reader was trained to read."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .forms import TITLE_ROW
from .pages import GRID_SIZE, WORD_LENGTH, Page

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

CELL_SIZE = 28  # pixels a side, the patch of the vision tower
FONT_SIZE = 11  # its characters are 7 pixels wide: four fill a cell
PAGE_SIZE = GRID_SIZE * CELL_SIZE
TEXT_FONT, CLUTTER_FONT = "DejaVuSansMono.ttf", "DejaVuSans.ttf"
TITLE_FONT = "DejaVuSans-Bold.ttf"
TITLE_SIZE = 22  # it stays within its row of cells
TITLE_GREY = BOX_GREY = 215  # of 255, which is paper; a title of 190 is counted as a field
BOX_INSET = 2  # pixels, from the cell's upper and lower edge


def render(page: Page) -> Image:
    """Black on white, `PAGE_SIZE` pixels a side, mode RGB; each character centred in its strip.

    The font is DejaVu Sans Mono, which matplotlib ships (the `cli` extra installs it).
    """
    image, draw = _blank()
    for row, words in enumerate(page.cells):
        for column, word in enumerate(words):
            _write(draw, row, column, word, TEXT_FONT)
    return image.convert("RGB")


def render_form(page: Page, title: str = "PARTS REQUEST") -> Image:
    """The same words in the same places, drawn as a form that people know: a box for each value,
    clutter in a lighter face, as small print, and the title in the second row, where it is blank.

    How strong all this is was found by measuring: with a black title, darker boxes, labels in bold
    or clutter in grey or bold, the shipped model reads fewer values right.
    """
    image, draw = _blank()
    if not any(page.cells[TITLE_ROW]):
        middle = (PAGE_SIZE / 2, (TITLE_ROW + 0.5) * CELL_SIZE)
        font = _font(TITLE_FONT, TITLE_SIZE)
        draw.text(middle, title, font=font, fill=TITLE_GREY, anchor="mm")
    for row, words in enumerate(page.cells):
        for column, word in enumerate(words):
            if word.endswith(":"):
                _box(draw, row, column + 1)
    for row, words in enumerate(page.cells):
        for column, word in enumerate(words):
            _write(draw, row, column, word, CLUTTER_FONT if word.islower() else TEXT_FONT)
    return image.convert("RGB")


def _blank() -> tuple[Image, ImageDraw]:
    from PIL import Image, ImageDraw

    image = Image.new("L", (PAGE_SIZE, PAGE_SIZE), 255)
    return image, ImageDraw.Draw(image)


def _write(draw: ImageDraw, row: int, column: int, word: str, font_name: str) -> None:
    font = _font(font_name, FONT_SIZE)
    strip = CELL_SIZE / WORD_LENGTH
    for i, character in enumerate(word):
        centre = (column * CELL_SIZE + (i + 0.5) * strip, (row + 0.5) * CELL_SIZE)
        draw.text(centre, character, font=font, fill=0, anchor="mm")


def _box(draw: ImageDraw, row: int, column: int) -> None:
    """Round a value's two cells, off the characters: its sides stand in the cells beside them."""
    left, top = column * CELL_SIZE - 2, row * CELL_SIZE + BOX_INSET
    right, bottom = (column + 2) * CELL_SIZE + 1, (row + 1) * CELL_SIZE - 1 - BOX_INSET
    draw.rectangle((left, top, right, bottom), outline=BOX_GREY)


@cache
def _font(name: str, size: int) -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", name)
    # The basic layout: the one that every build of Pillow has.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
