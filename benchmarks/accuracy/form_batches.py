"""Training batches for the form reader: pages as characters, drawn and augmented on the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from form_words import encode
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vlcache_triton.formreader import Page, Task, ask, draw_pages
from vlcache_triton.formreader.pages import (
    CONSONANTS,
    GRID_SIZE,
    SLOT_WIDTH,
    VOWELS,
    WORD_LENGTH,
)
from vlcache_triton.formreader.render import CELL_SIZE, FONT_SIZE

FIRST_CHARACTER, NUM_CHARACTERS = 32, 95  # printable ASCII; a space is a blank
FONTS = ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSans.ttf")
MAX_SHIFT = 1.5  # pixels; without it, another Pillow version's glyphs break the model
TASK_WEIGHTS = {"value": 0.3, "field": 0.35, "count": 0.05, "next": 0.22, "list": 0.08}
PAGE_WEIGHTS = {1: 0.8, 2: 0.14, 3: 0.06}  # pages a prompt
MAX_FIELDS = 18  # of a page
MIN_ROWS = 8
HEAD, TURN, END = "USER: ", "{} ASSISTANT: ", "USER: {} ASSISTANT: "
IGNORED = -100
FIRST_IMAGE_TOKEN = 2  # behind <s> and HEAD
VISUAL_TOKENS = GRID_SIZE**2  # a page


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
            (num_pages,) = rng.choices(list(PAGE_WEIGHTS), list(PAGE_WEIGHTS.values()))
            yield self.draw(rng, num_pages)

    def blank(self, num_pages: int) -> Batch:
        """A batch without content, of the shapes that `draw` gives, to compile with."""
        n = self.batch_size // num_pages
        length = FIRST_IMAGE_TOKEN + num_pages * (VISUAL_TOKENS + self.text_length)
        cells = torch.zeros(n, num_pages, GRID_SIZE, GRID_SIZE, WORD_LENGTH, dtype=torch.uint8)
        ids = torch.zeros(n, length, dtype=torch.int64)
        return Batch(cells, ids, ids, torch.ones(n, length))

    def draw(self, rng: Random, num_pages: int) -> Batch:
        """A batch of prompts of `num_pages` pages."""
        samples = [self._sample(rng, num_pages) for _ in range(self.batch_size // num_pages)]
        cells, rows, *text = (np.array(x) for x in zip(*samples, strict=True))
        fill(np.random.default_rng(rng.getrandbits(64)), cells, rows)
        return Batch(*map(torch.from_numpy, (cells, *text)))

    def _sample(self, rng: Random, num_pages: int) -> tuple[np.ndarray, ...]:
        """Cells `[pages, 24, 24, 4]`, rows in use `[24]`, input_ids, labels, weights `[length]`."""
        num_rows = GRID_SIZE if rng.random() < 0.5 else rng.randint(MIN_ROWS, GRID_SIZE)
        first = rng.randint(0, GRID_SIZE - num_rows)
        rows = range(first, first + num_rows)
        high = max(rng.randint(1, MAX_FIELDS), rng.randint(1, MAX_FIELDS))  # few are easy
        pages = draw_pages(rng, num_pages, fields=(max(1, high - 3), high), clutter=0, rows=rows)
        before = FIRST_IMAGE_TOKEN + num_pages * VISUAL_TOKENS
        length = before + num_pages * self.text_length
        ids = np.full(length, self.vocabulary["<pad>"])
        ids[:before] = self.vocabulary["<image>"]
        ids[:FIRST_IMAGE_TOKEN] = self.vocabulary["<s>"], self.vocabulary[HEAD]
        labels, weights = np.full(length, IGNORED), np.zeros(length, np.float32)
        end, template = before, "\n" + TURN
        for question in ask(rng, pages, draw_tasks(rng, sum(len(p.fields) for p in pages))):
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
        in_use = np.isin(np.arange(GRID_SIZE), rows)
        return np.stack([page_codes(page) for page in pages]), in_use, ids, labels, weights


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


def fill(rng: np.random.Generator, cells: np.ndarray, rows: np.ndarray) -> None:
    """Put lower-case words, in place, into 0 to 100 % of the cells that no field takes.

    Half the pages have them as `draw_pages` does, on some rows from an indent to an end, and half
    scattered evenly. cells: `[n, pages, 24, 24, 4]` uint8; rows: `[n, 24]` bool, rows in use.
    """
    pages = cells.reshape(-1, GRID_SIZE, GRID_SIZE, WORD_LENGTH)
    n = len(pages)
    keys = pages[..., -1] == ord(":") - FIRST_CHARACTER
    taken = keys.copy()
    for offset in range(1, SLOT_WIDTH):  # the value's two cells, and one that stays blank
        taken[..., offset:] |= keys[..., :-offset]
    share = rng.uniform(-0.1, 1.1, (n, 1, 1))  # all or nothing now and then
    scattered = rng.random((n, GRID_SIZE, GRID_SIZE)) < share
    columns = np.arange(GRID_SIZE)
    indent = rng.integers(0, 7, (n, GRID_SIZE, 1))
    end = indent - 1 + rng.geometric(0.12, (n, GRID_SIZE, 1))
    lines = (rng.random((n, GRID_SIZE, 1)) < share) & (indent <= columns) & (columns < end)
    lines &= rng.random((n, GRID_SIZE, GRID_SIZE)) < 0.8
    words = np.where(rng.random((n, 1, 1)) < 0.5, scattered, lines)
    words &= ~taken & np.repeat(rows, cells.shape[1], 0)[:, :, None]
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


def draw_glyphs() -> Tensor:
    """`[num_fonts, 95, 28, 7]` fp32: the ink of each character in its strip of a cell."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    width = CELL_SIZE // WORD_LENGTH
    fonts = []
    for name in FONTS:
        font = ImageFont.truetype(folder / name, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
        glyphs = []
        for code in range(NUM_CHARACTERS):
            strip = Image.new("L", (width, CELL_SIZE), 0)
            centre = (width / 2, CELL_SIZE / 2)
            character = chr(FIRST_CHARACTER + code)
            ImageDraw.Draw(strip).text(centre, character, font=font, fill=255, anchor="mm")
            glyphs.append(np.asarray(strip, np.float32) / 255)
        fonts.append(np.stack(glyphs))
    return torch.tensor(np.stack(fonts))


def draw_batch(
    cells: Tensor, glyphs: Tensor, mean: Tensor, std: Tensor, *, augment: bool = True
) -> Tensor:
    """Pages `[n, 24, 24, 4]` as normalised pixels `[n, 3, 672, 672]`, on their device.

    Font, shift, colours and noise vary by page; without `augment`, pages are as `render` draws
    them. mean and std are the image processor's, `[3]`.
    """
    n, device = len(cells), cells.device
    size = GRID_SIZE * CELL_SIZE

    def vary(*shape: int) -> Tensor:
        return torch.rand(n, *shape, device=device)

    font = torch.randint(len(glyphs) if augment else 1, (n, 1, 1, 1), device=device)
    ink = glyphs[font, cells.long()].permute(0, 1, 4, 2, 3, 5).reshape(n, 1, size, size)
    if augment:
        shift = torch.zeros(n, 2, 3, device=device)
        shift[:, 0, 0] = shift[:, 1, 1] = 1
        shift[:, :, 2] = (vary(2) * 2 - 1) * MAX_SHIFT * 2 / size
        grid = F.affine_grid(shift, [n, 1, size, size], align_corners=False)
        ink = F.grid_sample(ink, grid, align_corners=False)
        paper, colour = 0.7 + 0.3 * vary(3, 1, 1), 0.4 * vary(3, 1, 1)
        noise = torch.randn(n, 3, size, size, device=device) * (0.04 * vary(1, 1, 1))
        pixels = (paper + (colour - paper) * ink + noise).clamp(0, 1)
    else:
        pixels = (1 - ink).expand(-1, 3, -1, -1)
    return (pixels - mean[:, None, None]) / std[:, None, None]
