"""Are answers kept at a tenth of the cache? Whether a model's pages decide it, in miniature.

    python benchmarks/accuracy/miniature.py OUT

Trains models of 4 layers on one CPU core, alike but for their pages: of one design nine cells of
ten are blank, of the other 0 to 100 %, on one to three pages a prompt. Training has two phases, so
there are four models: of one design throughout, and of one and then the other. All are asked about
fresh pages of either design: with the full cache, and with the attention oracle's choice at 5, 10
and 20 % of it, without a row for what is evicted and with one. OUT/results.jsonl has each answer,
OUT/miniature.json the counts, OUT/miniature.md the table. What is done is kept: a run that was cut
off goes on from it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from random import Random
from statistics import fmean
from string import digits
from typing import Any, ClassVar

import numpy as np
import torch
from form_batches import FIRST_IMAGE_TOKEN, PAGE_WEIGHTS, Batch, Forms, fill, page_codes
from torch import Tensor
from train_form_reader import Painter, encode_texts, initial, save, train

from vlcache_triton.apps.chat import chat
from vlcache_triton.apps.cli.vlm import about
from vlcache_triton.apps.evaluation import Item, Query, Variant, evaluate_item, run, summarise
from vlcache_triton.apps.evaluation.markdown import table
from vlcache_triton.apps.evaluation.variants import FULL, attention_oracle, rivals, with_row
from vlcache_triton.apps.formreader import Field, Page, Question, ask, draw_pages, load_form_reader
from vlcache_triton.apps.formreader.pages import CONSONANTS, GRID_SIZE, SLOT_WIDTH

BUDGETS = (0.05, 0.1, 0.2)
GRID = 12  # cells a side of a page
DRAWN_ROWS = GRID**2 // GRID_SIZE  # as `draw_pages` draws it: each of its rows is two of these
MIN_ROWS = 2  # of those, on pages that vary: a third, as 8 of 24
KEYS = tuple(f"BA{last}" for last in CONSONANTS)  # told apart by one letter
VALUE_LENGTH = 3  # digits; all but the first are decoded from the compressed cache
MAX_FIELDS = 6  # of a page; KEYS has enough for three of them
CLUTTER = 0.3  # of the rows of pages that are mostly blank
WIDTH = 64
#: (most fields of a page, most copies of each), in turn in the first BEGINNING of the first phase.
STAGES, BEGINNING = ((3, 10), (4, 8), (6, 4), (6, 2), (MAX_FIELDS, 1)), 0.3
#: Steps, pages a step, tokens of text (questions and answers) a page.
Size = tuple[int, int, int]
SIZES: tuple[Size, Size] = ((4000, 6, 80), (800, 12, 20))
PAGES = 100
ASKED = "; asked about "


class BlankHeavy(Forms):
    """One page a prompt, a few lower-case words beside its field.

    Training has a first phase of several fields, which begins with some that stand on the page many
    times: so a value is found and read sooner. In the second, and in what is asked afterwards, a
    document has one field.
    """

    page_weights: ClassVar = {1: 1.0}
    grid_size = GRID
    augment = False
    min_rows, clutter = DRAWN_ROWS, CLUTTER
    num_drawn, steps = 0, 0  # batches, and of how many the first phase is; 0: one field alone

    def draw(self, rng: Random, num_pages: int) -> Batch:
        self.num_drawn += 1
        return super().draw(rng, num_pages)

    def draw_document(
        self, rng: Random, num_pages: int
    ) -> tuple[np.ndarray, np.ndarray, tuple[Question, ...]]:
        """As `Forms.draw_document`; every field is asked for its value, in any order."""
        num_rows = rng.randint(self.min_rows, DRAWN_ROWS)
        first = rng.randint(0, DRAWN_ROWS - num_rows)
        rows = range(first, first + num_rows)
        most, copies = self.stage()
        num_fields = rng.randint(1, most)
        slots = num_rows * (GRID_SIZE // SLOT_WIDTH)
        num_slots = num_fields * min(rng.randint((copies + 1) // 2, copies), slots // num_fields)
        drawn = draw_pages(
            rng, num_pages, fields=(num_slots, num_slots), clutter=self.clutter, rows=rows
        )
        pages = simplified(rng, drawn, num_fields)
        if not self.steps:
            with_field = rng.randrange(num_pages)
            pages = [p if i == with_field else without_fields(p) for i, p in enumerate(pages)]
        questions = ask(rng, pages, ["value"] * sum(len(page.fields) for page in pages))
        return np.stack([folded(page) for page in pages]), self.free(rows, num_pages), questions

    def stage(self) -> tuple[int, int]:
        """(most fields of a page, most copies of each)."""
        if not self.steps:
            return 1, 1
        begun = self.num_drawn / self.steps / BEGINNING
        return STAGES[min(int(begun * (len(STAGES) - 1)), len(STAGES) - 1)]

    def free(self, rows: range, num_pages: int) -> np.ndarray:
        """The rows that `fill` may put words into, `[pages, GRID]` bool."""
        return np.zeros((num_pages, GRID), bool)


class Varied(BlankHeavy):
    """One to three pages a prompt, a third of their rows or more in use, 0 to 100 % filled."""

    page_weights = PAGE_WEIGHTS
    min_rows, clutter = MIN_ROWS, 0.0

    def free(self, rows: range, num_pages: int) -> np.ndarray:
        in_use = np.isin(np.arange(DRAWN_ROWS), rows).repeat(GRID // DRAWN_ROWS)
        return np.stack([in_use] * num_pages)


DESIGNS: dict[str, type[BlankHeavy]] = {"blank-heavy": BlankHeavy, "varied": Varied}


def simplified(rng: Random, pages: Sequence[Page], num_fields: int) -> list[Page]:
    """The pages with `num_fields` fields each, again and again in the places of theirs: keys of
    KEYS and values of VALUE_LENGTH digits, which so small a model learns in minutes."""
    keys = iter(rng.sample(KEYS, num_fields * len(pages)))
    simple = []
    for page in pages:
        values = ["".join(rng.choices(digits, k=VALUE_LENGTH)) for _ in range(num_fields)]
        fields = [Field(next(keys), value) for value in values]
        cells, left = [list(row) for row in page.cells], cycle(fields)
        for row in cells:
            for column in [i for i, word in enumerate(row) if word.endswith(":")]:
                field = next(left)
                row[column : column + 3] = [field.key + ":", field.value, ""]
        simple.append(Page(tuple(map(tuple, cells)), tuple(fields)))
    return simple


def without_fields(page: Page) -> Page:
    """A page of `simplified` with nothing but its lower-case words."""
    rows = [[word if word.islower() else "" for word in row] for row in page.cells]
    return Page(tuple(map(tuple, rows)), ())


def folded(page: Page) -> np.ndarray:
    """`[GRID, GRID, 4]` uint8: the characters of the rows in use, each cut into two. A field's
    cells stay in one row, and all cells in their order."""
    return page_codes(page)[:DRAWN_ROWS].reshape(GRID, GRID, -1)


def untrained(seed: int) -> tuple[Any, Any]:
    """(model, processor): a tower of one layer and a decoder of four."""
    torch.manual_seed(seed)
    shipped, processor = initial("shipped", "cpu")
    config = copy.deepcopy(shipped.config)
    config.image_seq_length = GRID**2
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, vision.num_hidden_layers = 4, 1
    text.hidden_size = vision.hidden_size = vision.projection_dim = WIDTH
    text.intermediate_size, vision.intermediate_size = 3 * WIDTH, WIDTH
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 2, WIDTH // 2
    vision.num_attention_heads, vision.image_size = 2, vision.patch_size * GRID
    # Weights of 0.02, which suit a wide model, do next to nothing in a narrow one.
    text.initializer_range = vision.initializer_range = WIDTH**-0.5
    return type(shipped)(config), processor


def train_phase(out: Path, init: Path, phase: int, size: Size, design: str, seed: int) -> None:
    """Train on from `init/model` to `out/model`, every design alike; a phase that is done stays,
    one that was cut off begins anew."""
    if is_done(out):
        return
    steps, batch_size, text_length = size
    train(
        out,
        init=str(init / "model"),
        seconds=math.inf,
        max_steps=steps,
        reserve=0.0,
        batch_size=batch_size,
        text_length=text_length,
        learning_rate=3e-3,
        workers=0,
        checkpoint_every=120.0,
        eval_every=math.inf,
        eval_pages=0,
        seed=seed + phase,
        pages=type(design, (DESIGNS[design],), {"steps": 0 if phase else steps}),
        suites=(),
    )


def train_all(out: Path, sizes: tuple[Size, Size], seed: int) -> dict[str, list[Path]]:
    """The folders of the phases of each model: of every design in the first phase and in the
    second. Models of the same first phase share it."""
    start = out / "untrained"
    save(*untrained(seed), start / "model")
    models = {}
    for first in DESIGNS:
        begun = out / f"{first}, first phase"
        train_phase(begun, start, 0, sizes[0], first, seed)
        for second in DESIGNS:
            name = first if first == second else f"{first}, then {second}"
            train_phase(out / name, begun, 1, sizes[1], second, seed)
            models[name] = [begun, out / name]
    return models


def ask_about(
    model: Any, processor: Any, painter: Painter, trained_on: str, design: str, index: int
) -> dict[str, Any]:
    """What a model answers to fresh page `index` of a design, as `evaluate_item` has it; and
    of the attention that the full cache's answer pays to the prompt, the share on blank cells."""
    rng = Random(f"fresh-{design}-{index}")
    pages = DESIGNS[design]
    (num_pages,) = rng.choices(list(pages.page_weights), list(pages.page_weights.values()))
    forms = pages(processor.tokenizer.get_vocab(), 6, 0, 0)
    cells, free, (question,) = forms.draw_document(rng, num_pages)
    fill(np.random.default_rng(rng.getrandbits(64)), cells[None], free[None])
    text = processor.apply_chat_template(
        chat([None] * num_pages, [question.text]), add_generation_prompt=True
    )
    inputs = dict(encode_texts(processor, [text], GRID**2))
    inputs["pixel_values"] = painter(torch.from_numpy(cells), augment=False)
    blank = torch.from_numpy(~cells.any(-1)).flatten()
    shares = []

    def compare(budget: float, attention: Tensor | None) -> list[Variant]:
        floor = [v for v in rivals(budget) if v.name in ("random", "vl_cache", "tuned")]
        if attention is None:
            return floor
        visual = attention[..., FIRST_IMAGE_TOKEN : FIRST_IMAGE_TOKEN + len(blank)]
        shares[:] = [float(visual[..., blank].sum() / attention.sum())]
        oracle = attention_oracle(budget, attention)
        return [*floor, oracle, with_row(oracle)]

    item = Item(
        suite_name(trained_on, design), index, [], (question.text,), (), (question.answer,),
        VALUE_LENGTH + 1,
    )  # fmt: skip
    query = Query(inputs, torch.empty(0, dtype=torch.int64))
    result = evaluate_item(model, processor, item, query, BUDGETS, compare)
    blank_cells = float(blank.float().mean())
    return {**result, "blank_cells": blank_cells, "attention_to_blanks": sum(shares)}


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What was written down of a phase, nothing before it began."""
    path = folder / "train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_done(folder: Path) -> bool:
    return any("final" in entry for entry in log_of(folder))


def miniature(out: Path, sizes: tuple[Size, Size], num_pages: int, seed: int) -> dict[str, Any]:
    """Train what is not trained yet, ask what is not answered yet; write and return the counts."""
    jobs: list[tuple[str, int, Callable[[], dict[str, Any]]]] = []
    minutes = {}
    for trained_on, folders in train_all(out, sizes, seed).items():
        minutes |= {f.name: round(log_of(f)[-1]["seconds"] / 60, 1) for f in folders}
        model, processor = load_form_reader(folders[-1] / "model")
        painter = Painter(processor.image_processor, "cpu")
        for design in DESIGNS:
            answers = functools.partial(ask_about, model, processor, painter, trained_on, design)
            name = suite_name(trained_on, design)
            jobs += [(name, i, functools.partial(answers, i)) for i in range(num_pages)]
    results = run(sorted(jobs, key=lambda job: job[1]), out / "results.jsonl")
    shares = {
        name: {
            key: round(fmean(r[key] for r in results if r["suite"] == name), 3)
            for key in ("blank_cells", "attention_to_blanks")
        }
        for name in dict.fromkeys(job[0] for job in jobs)
    }
    counts = {
        "about": {
            **about("miniature", torch.device("cpu")),
            "minutes of training": minutes,
            "steps": [steps for steps, _, _ in sizes],
            "seed": seed,
        },
        "shares": shares,
        "cells": [asdict(cell) for cell in summarise(results) if cell.suite in shares],
    }
    (out / "miniature.json").write_text(json.dumps(counts, indent=1) + "\n")
    (out / "miniature.md").write_text(page(counts))
    return counts


def suite_name(trained_on: str, design: str) -> str:
    return trained_on + ASKED + design


def page(counts: dict[str, Any]) -> str:
    """The table of what is kept."""
    cells = {(c["suite"], c["variant"], c["budget"]): c for c in counts["cells"]}
    variants = dict.fromkeys(c["variant"] for c in counts["cells"] if c["variant"] != FULL)
    rows = []
    for suite, shares in counts["shares"].items():
        full = cells[suite, FULL, 1.0]
        first = [*suite.split(ASKED), f"{full['num_full']} of {full['num_items']}"]
        first.append(f"{shares['attention_to_blanks']:.2f}")
        for variant in variants:
            kept = [cells.get((suite, variant, budget)) for budget in BUDGETS]
            rows.append([*first, variant, *map(_kept, kept)])
            first = [""] * len(first)
    head = ["trained on", "asked about", "right with all", "attention to blanks", "kept by"]
    return table([*head, *(f"{budget:.0%}" for budget in BUDGETS)], rows) + "\n"


def _kept(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["retained"] is None:
        return ""
    share, low, high = (cell[key] for key in ("retained", "retained_low", "retained_high"))
    return f"{share:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for models, answers and counts")
    parser.add_argument("--pages", type=int, default=PAGES, help="fresh ones a model and design")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model only waits for further threads
    miniature(args.out, SIZES, args.pages, args.seed)


if __name__ == "__main__":
    main()
