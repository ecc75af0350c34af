"""The picture is laid out as the pages were that the model was trained on."""

from random import Random

import numpy as np
from PIL import Image, ImageDraw

from vlcache_triton.apps.formreader import Page, draw_form, draw_pages, render, render_form
from vlcache_triton.apps.formreader.pages import GRID_SIZE, WORD_LENGTH
from vlcache_triton.apps.formreader.render import (
    BOX_GREY,
    CELL_SIZE,
    FONT_SIZE,
    PAGE_SIZE,
    TEXT_FONT,
    TITLE_GREY,
    _font,
)


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
                ImageDraw.Draw(strip).text(
                    centre, character, 255, _font(TEXT_FONT, FONT_SIZE), anchor="mm"
                )
                expected[row, column, :, i * width : (i + 1) * width] = np.asarray(strip)
    difference = np.abs(ink(render(page)) - expected)
    assert difference.max() <= 2  # anti-aliasing may round differently, black on white


def test_a_form_has_boxes_round_its_values_and_its_small_print_in_another_face():
    (page,) = draw_form("form", ["value"], 8).pages
    plain, form = render(page), render_form(page)
    assert (form.size, form.mode) == ((PAGE_SIZE, PAGE_SIZE), "RGB")
    num_boxes = 0
    pixels = np.asarray(form.convert("L"))
    for row, words in enumerate(page.cells):
        for column, word in enumerate(words):
            if word.islower():
                assert ink(form)[row, column].any()
                assert (ink(form)[row, column] != ink(plain)[row, column]).any()
            elif word.endswith(":"):
                box = pixels[row * CELL_SIZE : (row + 1) * CELL_SIZE]
                inner = box[:, (column + 1) * CELL_SIZE : (column + 3) * CELL_SIZE]
                assert (inner == BOX_GREY).all(axis=1).sum() == 2  # upper and lower side
                num_boxes += 1
    assert num_boxes == 8


def test_a_form_has_its_title_where_there_is_room():
    for num_fields, has_title in ((8, True), (144, False)):
        (page,) = draw_form("form", ["value"], num_fields).pages
        first, second = (np.asarray(render_form(page, t).convert("L")) for t in ("", "ORDER"))
        differs = (first != second).reshape(GRID_SIZE, CELL_SIZE, PAGE_SIZE).any(axis=(1, 2))
        assert differs.nonzero()[0].tolist() == ([1] if has_title else [])  # one row of cells
        assert not has_title or second[CELL_SIZE : 2 * CELL_SIZE].min() == TITLE_GREY


def test_letters_stand_where_the_model_learned_them():
    """A form adds boxes and a title; the letters of fields are pixel by pixel the plain page's."""
    (page,) = draw_form("form", ["value"], 8).pages
    plain, form = (np.asarray(x.convert("L")) for x in (render(page), render_form(page)))
    for row, words in enumerate(page.cells):
        if any(word.endswith(":") for word in words):
            band = slice(row * CELL_SIZE + 6, (row + 1) * CELL_SIZE - 6)
            dark = plain[band] < 128
            assert dark.any() and (np.abs(form[band].astype(int) - plain[band])[dark] <= 40).all()
