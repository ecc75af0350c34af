"""Training batches for the form reader: pages as characters, drawn and augmented on the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vlcache_triton.formreader import Page, ask, draw_pages
from vlcache_triton.formreader.pages import GRID_SIZE, WORD_LENGTH
from vlcache_triton.formreader.render import CELL_SIZE, FONT_SIZE

FIRST_CHARACTER, NUM_CHARACTERS = 32, 95  # printable ASCII; a space is a blank
FONTS = ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSans.ttf")
MAX_SHIFT = 1.5  # pixels; without it, another Pillow version's glyphs break the model
TASK_WEIGHTS = {"value": 0.55, "field": 0.2, "count": 0.07, "next": 0.1, "list": 0.08}
HEAD, TURN, END = "USER: ", "{} ASSISTANT: ", "USER: {} ASSISTANT: "
IGNORED = -100
FIRST_IMAGE_TOKEN = 1 + len(HEAD)


class Batch(NamedTuple):
    """cells: `[n, 24, 24, 4]` int64 characters, 0 a blank; input_ids: `[n, length]` int64;
    labels: like input_ids, IGNORED but on answers."""

    cells: Tensor
    input_ids: Tensor
    labels: Tensor


class Forms(IterableDataset):
    """Endless batches of fresh pages, each with as many questions as fit.

    Args:
        vocabulary: of the tokenizer, character to id.
        batch_size: pages.
        text_length: tokens behind the image.
        seed: another seed is other pages; workers differ, too.
    """

    def __init__(
        self, vocabulary: dict[str, int], batch_size: int, text_length: int, seed: int
    ) -> None:
        self.vocabulary, self.batch_size = vocabulary, batch_size
        self.text_length, self.seed = text_length, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = Random(f"train-{self.seed}-{worker.id if worker else 0}")
        while True:
            samples = [self._sample(rng) for _ in range(self.batch_size)]
            yield Batch(*(torch.tensor(np.array(x)) for x in zip(*samples, strict=True)))

    def _sample(self, rng: Random) -> tuple[np.ndarray, list[int], list[int]]:
        low, high = rng.choice((1, 2, 4)), rng.choice((4, 8, 16, 16))
        clutter = rng.choice((0.0, 0.3, 0.7))
        (page,) = draw_pages(rng, fields=(low, high), clutter=clutter)
        ids = [self.vocabulary["<s>"], *self._encode(HEAD)]
        ids += [self.vocabulary["<image>"]] * GRID_SIZE**2
        labels = [IGNORED] * len(ids)
        length = len(ids) + self.text_length
        template = "\n" + TURN
        while True:
            (task,) = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))
            (question,) = ask(rng, [page], [task])  # type: ignore[list-item]
            asked = self._encode(template.format(question.text))
            answer = [*self._encode(question.answer), self.vocabulary["</s>"]]
            if len(ids) + len(asked) + len(answer) > length:
                break
            ids += asked + answer
            labels += [IGNORED] * len(asked) + answer
            template = END
        padding = length - len(ids)
        ids += [self.vocabulary["<pad>"]] * padding
        return page_codes(page), ids, labels + [IGNORED] * padding

    def _encode(self, text: str) -> list[int]:
        return [self.vocabulary[character] for character in text]


def page_codes(page: Page) -> np.ndarray:
    """`[24, 24, 4]` int64: the characters of each cell, 0 a blank."""
    words = "".join(word.ljust(WORD_LENGTH) for row in page.cells for word in row)
    codes = np.frombuffer(words.encode("ascii"), np.uint8).astype(np.int64) - FIRST_CHARACTER
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


def draw_batch(cells: Tensor, glyphs: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pages `[n, 24, 24, 4]` as normalised pixels `[n, 3, 672, 672]`, on their device.

    Font, shift, colours and noise vary by page. mean and std are the image processor's, `[3]`.
    """
    n, device = len(cells), cells.device
    size = GRID_SIZE * CELL_SIZE
    font = torch.randint(len(glyphs), (n, 1, 1, 1), device=device)
    ink = glyphs[font, cells].permute(0, 1, 4, 2, 3, 5).reshape(n, 1, size, size)
    shift = torch.zeros(n, 2, 3, device=device)
    shift[:, 0, 0] = shift[:, 1, 1] = 1
    shift[:, :, 2] = (torch.rand(n, 2, device=device) * 2 - 1) * MAX_SHIFT * 2 / size
    grid = F.affine_grid(shift, [n, 1, size, size], align_corners=False)
    ink = F.grid_sample(ink, grid, align_corners=False)
    paper = 0.7 + 0.3 * torch.rand(n, 3, 1, 1, device=device)
    colour = 0.4 * torch.rand(n, 3, 1, 1, device=device)
    noise = 0.04 * torch.rand(n, 1, 1, 1, device=device)
    pixels = paper * (1 - ink) + colour * ink
    pixels = (pixels + noise * torch.randn(n, 3, size, size, device=device)).clamp(0, 1)
    return (pixels - mean[:, None, None]) / std[:, None, None]
