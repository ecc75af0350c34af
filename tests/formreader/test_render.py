"""The picture is laid out as the pages were that the model was trained on."""

from random import Random

import numpy as np
from PIL import Image, ImageDraw

from vlcache_triton.formreader import Page, draw_pages, render
from vlcache_triton.formreader.pages import GRID_SIZE, WORD_LENGTH
from vlcache_triton.formreader.render import CELL_SIZE, PAGE_SIZE, _font


def ink(image):
    """`[rows, columns, CELL_SIZE, CELL_SIZE]`, the cells of the grid, 0 where white."""
    grey = 255 - np.asarray(image.convert("L"), np.int16)
    shape = (GRID_SIZE, CELL_SIZE, GRID_SIZE, CELL_SIZE)
    return grey.reshape(shape).transpose(0, 2, 1, 3)


def test_a_cell_holds_its_word_and_a_blank_cell_nothing():
    (page,) = draw_pages(Random(3))
    image = render(page)
    assert (image.size, image.mode) == ((PAGE_SIZE, PAGE_SIZE), "RGB")
    inked = ink(image).any(axis=(2, 3))
    written = np.array([[bool(word) for word in words] for words in page.cells])
    assert np.array_equal(inked, written)


def test_a_word_looks_the_same_in_every_cell():
    page = Page(cells=(("W8:j",) * GRID_SIZE,) * GRID_SIZE, fields=())
    cells = ink(render(page))
    assert cells[0, 0].any()
    assert (cells == cells[0, 0]).all()


def test_each_character_is_centred_in_its_quarter_of_the_cell():
    width = CELL_SIZE // WORD_LENGTH
    (page,) = draw_pages(Random(5), clutter=1.0)
    expected = np.zeros((GRID_SIZE, GRID_SIZE, CELL_SIZE, CELL_SIZE), np.int16)
    for row, words in enumerate(page.cells):
        for column, word in enumerate(words):
            for i, character in enumerate(word):
                strip = Image.new("L", (width, CELL_SIZE), 0)
                centre = (width / 2, CELL_SIZE / 2)
                ImageDraw.Draw(strip).text(centre, character, 255, _font(), anchor="mm")
                expected[row, column, :, i * width : (i + 1) * width] = np.asarray(strip)
    difference = np.abs(ink(render(page)) - expected)
    assert difference.max() <= 2  # anti-aliasing may round differently, black on white
