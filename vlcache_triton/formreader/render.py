"""Draw a form as the image that the form reader was trained to read."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .pages import GRID_SIZE, WORD_LENGTH, Page

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

CELL_SIZE = 28  # pixels a side, the patch of the vision tower
FONT_SIZE = 11  # its characters are 7 pixels wide: four fill a cell
PAGE_SIZE = GRID_SIZE * CELL_SIZE


def render(page: Page) -> Image:
    """Black on white, `PAGE_SIZE` pixels a side, mode RGB; each character centred in its strip.

    The font is DejaVu Sans Mono, which matplotlib ships (the `cli` extra installs it).
    """
    from PIL import Image, ImageDraw

    font = _font()
    strip = CELL_SIZE / WORD_LENGTH
    image = Image.new("L", (PAGE_SIZE, PAGE_SIZE), 255)
    draw = ImageDraw.Draw(image)
    for row, words in enumerate(page.cells):
        for column, word in enumerate(words):
            for i, character in enumerate(word):
                centre = (column * CELL_SIZE + (i + 0.5) * strip, (row + 0.5) * CELL_SIZE)
                draw.text(centre, character, font=font, fill=0, anchor="mm")
    return image.convert("RGB")


@cache
def _font() -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")
    # The basic layout: the one that every build of Pillow has.
    return ImageFont.truetype(path, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
