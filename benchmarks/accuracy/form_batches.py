"""Training batches for the form reader: pages as characters, drawn and augmented on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from form_words import encode
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vlcache_triton.apps.formreader import Page, Question, Task, ask, draw_pages
from vlcache_triton.apps.formreader.pages import (
    CONSONANTS,
    GRID_SIZE,
    SLOT_WIDTH,
    VOWELS,
    WORD_LENGTH,
)
from vlcache_triton.apps.formreader.render import CELL_SIZE, FONT_SIZE

FIRST_CHARACTER, NUM_CHARACTERS = 32, 95  # printable ASCII; a space is a blank
FONTS = ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSans.ttf")
BOLD = 1  # of FONTS, which labels of a form have
TITLE_FONT, TITLE_SIZE, NUM_TITLES = "DejaVuSans-Bold.ttf", 22, 64
TITLE_ROW = 1
FORM_SHARE = 0.5  # of the pages, drawn as a form that people know
COLUMNS_SHARE = 0.25  # of the pages, laid out in columns
MAX_SHIFT = 1.5  # pixels; without it, another Pillow version's glyphs break the model
TASK_WEIGHTS = {"value": 0.3, "field": 0.35, "count": 0.05, "next": 0.22, "list": 0.08}
PAGE_WEIGHTS = {1: 0.8, 2: 0.14, 3: 0.06}  # pages a prompt
MAX_FIELDS = 18  # of a page
MIN_ROWS = 8
HEAD, TURN, END = "USER: ", "{} ASSISTANT: ", "USER: {} ASSISTANT: "
IGNORED = -100
FIRST_IMAGE_TOKEN = 2  # behind <s> and HEAD


class Batch(NamedTuple):
    """cells: `[n, pages, 24, 24, 4]` uint8 characters, 0 a blank; input_ids: `[n, length]` int64,
    laid out as FIRST_IMAGE_TOKEN tokens, the pages' visual tokens, text; labels: like input_ids,
    IGNORED but on answers; weights: like input_ids, fp32, of the labels."""

    cells: Tensor
    input_ids: Tensor
    labels: Tensor
    weights: Tensor


class Forms(IterableDataset):
    """Endless batches of fresh pages, each with as many questions as fit.

    All prompts of a batch have equally many pages, and all batches equally many pages in all.

    Args:
        vocabulary: of a tokenizer with words (see form_words), token to id.
        batch_size: pages, divisible by 6.
        text_length: tokens behind the images, for each of a prompt's pages.
        seed: another seed is other pages; workers differ, too.
    """

    page_weights = PAGE_WEIGHTS
    augment = True  # see draw_batch
    grid_size = GRID_SIZE  # cells a side of a page, of which each is a visual token

    def __init__(
        self, vocabulary: dict[str, int], batch_size: int, text_length: int, seed: int
    ) -> None:
        if batch_size < 1 or any(batch_size % pages for pages in PAGE_WEIGHTS):
            raise ValueError(f"batch_size: got {batch_size}, expected a multiple of 6")
        self.vocabulary, self.batch_size = vocabulary, batch_size
        self.text_length, self.seed = text_length, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = Random(f"train-{self.seed}-{worker.id if worker else 0}")
        while True:
            (num_pages,) = rng.choices(list(self.page_weights), list(self.page_weights.values()))
            yield self.draw(rng, num_pages)

    def blank(self, num_pages: int) -> Batch:
        """A batch without content, of the shapes that `draw` gives, to compile with."""
        n = self.batch_size // num_pages
        grid = self.grid_size, self.grid_size
        length = FIRST_IMAGE_TOKEN + num_pages * (math.prod(grid) + self.text_length)
        cells = torch.zeros(n, num_pages, *grid, WORD_LENGTH, dtype=torch.uint8)
        ids = torch.zeros(n, length, dtype=torch.int64)
        return Batch(cells, ids, ids, torch.ones(n, length))

    def draw(self, rng: Random, num_pages: int) -> Batch:
        """A batch of prompts of `num_pages` pages."""
        samples = [self._sample(rng, num_pages) for _ in range(self.batch_size // num_pages)]
        cells, rows, *text = (np.array(x) for x in zip(*samples, strict=True))
        fill(np.random.default_rng(rng.getrandbits(64)), cells, rows)
        return Batch(*map(torch.from_numpy, (cells, *text)))

    def _sample(self, rng: Random, num_pages: int) -> tuple[np.ndarray, ...]:
        """Cells `[pages, 24, 24, 4]`, rows for filler `[pages, 24]`, input_ids, labels, weights
        `[length]`."""
        cells, free, questions = self.draw_document(rng, num_pages)
        before = FIRST_IMAGE_TOKEN + num_pages * self.grid_size**2
        length = before + num_pages * self.text_length
        ids = np.full(length, self.vocabulary["<pad>"])
        ids[:before] = self.vocabulary["<image>"]
        ids[:FIRST_IMAGE_TOKEN] = self.vocabulary["<s>"], self.vocabulary[HEAD]
        labels, weights = np.full(length, IGNORED), np.zeros(length, np.float32)
        end, template = before, "\n" + TURN
        for question in questions:
            asked = encode(self.vocabulary, template.format(question.text))
            answer = [*encode(self.vocabulary, question.answer), self.vocabulary["</s>"]]
            answer_start = end + len(asked)
            answer_end = answer_start + len(answer)
            if answer_end > length:
                break
            ids[end:answer_end] = asked + answer
            labels[answer_start:answer_end] = answer
            # Between an equal say for each token and for each answer: lists are long and easy.
            weights[answer_start:answer_end] = len(answer) ** -0.5
            end, template = answer_end, END
        return cells, free, ids, labels, weights

    def draw_document(
        self, rng: Random, num_pages: int
    ) -> tuple[np.ndarray, np.ndarray, tuple[Question, ...]]:
        """Cells `[pages, 24, 24, 4]` without filler, the rows that it may take `[pages, 24]`, and
        what is asked, as much of it as the text has room for."""
        num_rows = GRID_SIZE if rng.random() < 0.5 else rng.randint(MIN_ROWS, GRID_SIZE)
        first = rng.randint(0, GRID_SIZE - num_rows)
        rows = range(first, first + num_rows)
        high = max(rng.randint(1, MAX_FIELDS), rng.randint(1, MAX_FIELDS))  # few are easy
        fields = max(1, high - 3), high
        pages = list(draw_pages(rng, num_pages, fields=fields, clutter=0, rows=rows))
        questions = ask(rng, pages, draw_tasks(rng, sum(len(p.fields) for p in pages)))
        in_use = [np.isin(np.arange(GRID_SIZE), rows)] * num_pages
        for i, page in enumerate(pages):
            if rng.random() < COLUMNS_SHARE:
                pages[i], in_use[i] = in_columns(rng, page)
        return np.stack([page_codes(p) for p in pages]), np.stack(in_use), questions


def draw_tasks(rng: Random, num_fields: int) -> list[Task]:
    """Tasks for a dialogue that asks about no field twice, so that none of its answers can be
    copied from the text: one count and one list at most, and no "next" behind a list."""
    drawn = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()), k=num_fields)
    tasks: list[Any] = []
    for task in drawn:
        once = task in ("count", "list")
        if not (once and task in tasks) and not (task == "next" and "list" in tasks):
            tasks.append(task)
    return tasks


def in_columns(rng: Random, page: Page) -> tuple[Page, np.ndarray]:
    """A page's fields, in their order, below each other in columns, as on a form that people know;
    and the rows that filler may take, `[24]` bool: a line in the header, all behind the fields."""
    columns = rng.choice([1, 2, 2, 3, 3, 4, 6])
    lines = -(-len(page.fields) // columns)
    step = rng.choice([n for n in (1, 2, 3) if n * lines <= GRID_SIZE])
    top = min(rng.choice([0, 2, 4, 4, 5]), GRID_SIZE - step * lines)
    width = GRID_SIZE // columns
    indent = rng.choice([(width - 3) // 2, rng.randint(0, width - 3)])
    cells = [[""] * GRID_SIZE for _ in range(GRID_SIZE)]
    for i, field in enumerate(page.fields):
        line, column = divmod(i, columns)
        start = column * width + indent
        words = [field.key + ":", field.value[:WORD_LENGTH], field.value[WORD_LENGTH:]]
        cells[top + line * step][start : start + len(words)] = words
    rows = np.arange(GRID_SIZE)
    free = ((rows == top - 2) & (rows != TITLE_ROW)) | (rows > top + step * lines)
    return Page(tuple(map(tuple, cells)), page.fields), free


def fill(rng: np.random.Generator, cells: np.ndarray, rows: np.ndarray) -> None:
    """Put lower-case words, in place, into 0 to 100 % of the cells that no field takes.

    Half the pages have them as `draw_pages` does, on some rows from an indent to an end, and half
    scattered evenly. cells: `[n, pages, 24, 24, 4]` uint8; rows: `[n, pages, 24]` bool, in use.
    """
    pages = cells.reshape(-1, *cells.shape[2:])
    n, grid_size = pages.shape[:2]
    keys = pages[..., -1] == ord(":") - FIRST_CHARACTER
    taken = keys.copy()
    for offset in range(1, SLOT_WIDTH):  # the value's two cells, and one that stays blank
        taken[..., offset:] |= keys[..., :-offset]
    share = rng.uniform(-0.1, 1.1, (n, 1, 1))  # all or nothing now and then
    scattered = rng.random((n, grid_size, grid_size)) < share
    columns = np.arange(grid_size)
    indent = rng.integers(0, 7, (n, grid_size, 1))
    end = indent - 1 + rng.geometric(0.12, (n, grid_size, 1))
    lines = (rng.random((n, grid_size, 1)) < share) & (indent <= columns) & (columns < end)
    lines &= rng.random((n, grid_size, grid_size)) < 0.8
    words = np.where(rng.random((n, 1, 1)) < 0.5, scattered, lines)
    words &= ~taken & rows.reshape(-1, grid_size, 1)
    pages[words] = _filler()[rng.integers(len(_filler()), size=words.sum())]


@cache
def _filler() -> np.ndarray:
    """`[24300, 4]` uint8: the lower-case words of `draw_pages`, each length as often."""
    words = []
    for length in range(2, WORD_LENGTH + 1):
        letters = [(CONSONANTS, VOWELS)[i % 2].lower() for i in range(length)]
        words.append(["".join(w) for w in product(*letters)])
    longest = max(map(len, words))
    text = "".join(w.ljust(WORD_LENGTH) for some in words for w in some * (longest // len(some)))
    return (np.frombuffer(text.encode("ascii"), np.uint8) - FIRST_CHARACTER).reshape(-1, 4)


def page_codes(page: Page) -> np.ndarray:
    """`[24, 24, 4]` uint8: the characters of each cell, 0 a blank."""
    words = "".join([word.ljust(WORD_LENGTH) for row in page.cells for word in row])
    codes = np.frombuffer(words.encode("ascii"), np.uint8) - FIRST_CHARACTER
    return codes.reshape(GRID_SIZE, GRID_SIZE, WORD_LENGTH)


class Stamps(NamedTuple):
    """What pages are made of, as ink in [0, 1], fp32.

    glyphs: `[num_fonts, 95, 28, 7]`, each character in its strip of a cell.
    boxes: `[6, 28, 28]`, what a cell has of the outlines of values (see draw_boxes).
    titles: `[NUM_TITLES, 28, 672]`, a row of cells each.
    """

    glyphs: Tensor
    boxes: Tensor
    titles: Tensor


def draw_stamps(device: str = "cpu") -> Stamps:
    return Stamps(*(x.to(device) for x in (draw_glyphs(), draw_boxes(), draw_titles())))


def draw_glyphs() -> Tensor:
    from PIL import Image, ImageDraw

    width = CELL_SIZE // WORD_LENGTH
    fonts = []
    for name in FONTS:
        font = _font(name, FONT_SIZE)
        glyphs = []
        for code in range(NUM_CHARACTERS):
            strip = Image.new("L", (width, CELL_SIZE), 0)
            centre = (width / 2, CELL_SIZE / 2)
            character = chr(FIRST_CHARACTER + code)
            ImageDraw.Draw(strip).text(centre, character, font=font, fill=255, anchor="mm")
            glyphs.append(np.asarray(strip, np.float32) / 255)
        fonts.append(np.stack(glyphs))
    return torch.tensor(np.stack(fonts))


def draw_boxes() -> Tensor:
    """By place in a field: 0 none, 1 its label, 2 and 3 its value, 4 the cell behind; 5 that cell
    where it is the next field's label. The sides stand in the cells beside the value's."""
    inset, outset = 2, 2  # pixels
    sides = (inset, CELL_SIZE - 1 - inset)
    boxes = torch.zeros(6, CELL_SIZE, CELL_SIZE)
    boxes[1, sides[0] : sides[1] + 1, -outset] = 1
    boxes[4, sides[0] : sides[1] + 1, outset - 1] = 1
    for side in sides:
        boxes[1, side, -outset:] = 1
        boxes[2:4, side] = 1
        boxes[4, side, :outset] = 1
    boxes[5] = boxes[1] + boxes[4]
    return boxes


def draw_titles() -> Tensor:
    """One to three words in capitals, most in the middle, some to the left."""
    from PIL import Image, ImageDraw

    rng, size = Random("titles"), GRID_SIZE * CELL_SIZE
    font = _font(TITLE_FONT, TITLE_SIZE)
    titles = []
    for _ in range(NUM_TITLES):
        lengths = [rng.randint(3, 8) for _ in range(rng.randint(1, 3))]
        words = ["".join(rng.choices(ascii_uppercase, k=length)) for length in lengths]
        strip = Image.new("L", (size, CELL_SIZE), 0)
        x, anchor = (size / 2, "mm") if rng.random() < 0.7 else (rng.randint(5, 80), "lm")
        ImageDraw.Draw(strip).text(
            (x, CELL_SIZE / 2), " ".join(words), font=font, fill=255, anchor=anchor
        )
        titles.append(np.asarray(strip, np.float32) / 255)
    return torch.tensor(np.stack(titles))


def _font(name: str, size: int) -> Any:
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", name)
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def draw_batch(
    cells: Tensor, stamps: Stamps, mean: Tensor, std: Tensor, *, augment: bool = True
) -> Tensor:
    """Pages `[n, 24, 24, 4]` as normalised pixels `[n, 3, 672, 672]`, on their device.

    Font, shift, colours and noise vary by page, and some are drawn as forms (see vary_ink); without
    `augment`, pages are as `render` draws them. mean and std are the image processor's, `[3]`.
    """
    n, device = len(cells), cells.device
    if augment:
        ink = vary_ink(cells, stamps)
        size = ink.shape[-1]
        shift = torch.zeros(n, 2, 3, device=device)
        shift[:, 0, 0] = shift[:, 1, 1] = 1
        shift[:, :, 2] = (torch.rand(n, 2, device=device) * 2 - 1) * MAX_SHIFT * 2 / size
        grid = F.affine_grid(shift, [n, 1, size, size], align_corners=False)
        ink = F.grid_sample(ink, grid, align_corners=False)
        paper = 0.7 + 0.3 * torch.rand(n, 3, 1, 1, device=device)
        colour = 0.4 * torch.rand(n, 3, 1, 1, device=device)
        noise = torch.randn(n, 3, size, size, device=device)
        noise *= 0.04 * torch.rand(n, 1, 1, 1, device=device)
        pixels = (paper + (colour - paper) * ink + noise).clamp(0, 1)
    else:
        pixels = (1 - _assemble(stamps.glyphs[0, cells.long()])).expand(-1, 3, -1, -1)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def vary_ink(cells: Tensor, stamps: Stamps) -> Tensor:
    """Ink `[n, 1, 672, 672]` of pages `[n, 24, 24, 4]`, each in a font of its own.

    FORM_SHARE of them look like forms that people know: most with labels in bold and values in
    pale boxes, all with small words paler, most with a title if the row for it is blank.
    """
    n, device = len(cells), cells.device

    def chance(share: float) -> Tensor:
        return torch.rand(n, 1, 1, device=device) < share

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, device=device)

    form = chance(FORM_SHARE)
    labels = cells[..., -1] == ord(":") - FIRST_CHARACTER
    small = cells[..., 0] >= ord("a") - FIRST_CHARACTER
    font = torch.randint(len(stamps.glyphs), (n, 1, 1), device=device)
    font = torch.where(labels & form & chance(0.75), BOLD, font)
    strength = torch.where(small & form, between(0.45, 1.0), 1.0)
    glyphs = stamps.glyphs[font[..., None], cells.long()]
    ink = _assemble(glyphs * strength[..., None, None, None])
    places = labels.long()
    for offset in range(1, SLOT_WIDTH):
        places[..., offset:] += labels[..., :-offset] * (offset + 1)
    strength = between(0.15, 0.5) * (form & chance(0.7))
    boxes = stamps.boxes[places] * strength[..., None, None]
    ink = torch.maximum(ink, _assemble(boxes[:, :, :, None]))
    blank = ~cells[:, TITLE_ROW].bool().flatten(1).any(1)[:, None, None]
    titles = stamps.titles[torch.randint(len(stamps.titles), (n,), device=device)]
    row = ink[:, 0, TITLE_ROW * CELL_SIZE : (TITLE_ROW + 1) * CELL_SIZE]
    row += titles * between(0.2, 1.0) * (form & blank & chance(0.8))
    return ink


def _assemble(strips: Tensor) -> Tensor:
    """`[n, 1, 672, 672]` of cells in strips, `[n, 24, 24, strips, 28, width of a strip]`."""
    size = strips.shape[1] * CELL_SIZE
    return strips.permute(0, 1, 4, 2, 3, 5).reshape(len(strips), 1, size, size)
