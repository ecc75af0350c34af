"""`vlcache eval`: how well compressed caches answer, against the full one and every rival."""

from __future__ import annotations

import functools
import json as json_module
import platform
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from .console import UserError, one_line, print_json, progress
from .options import DeviceOption, Dtype, DtypeOption, JsonOption, ModelOption

if TYPE_CHECKING:
    from vlcache_triton.apps.evaluation import Cell, Item

    from .vlm import VisionLanguageModel

# The names of vlcache_triton.apps.evaluation.SUITES, which take torch to import.
SUITE_NAMES = ("value", "field", "count", "next", "list", "value, 2 images", "value, 3 turns")
QUICK_PAGES = 6
QUICK_SUITES = ["value", "next", "value, 3 turns"]
QUICK_BUDGETS = [0.05, 0.1, 0.2, 0.4]
RESULTS, SETTINGS = "results.jsonl", "settings.json"

#: (suite, index, how to evaluate it).
Job = tuple[str, int, Callable[[], dict[str, Any]]]


DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Your questions: questions.jsonl, or the folder that has it.",
    ),
]
PagesOption = Annotated[
    int, typer.Option("--pages", min=1, metavar="N", help="Synthetic forms a suite.")
]
SuitesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        metavar="NAME",
        help=f"A suite of synthetic forms; again for more. {'; '.join(SUITE_NAMES)}.",
        show_default="all",
    ),
]
BudgetsOption = Annotated[
    list[float] | None,
    typer.Option(
        "--budget",
        metavar="SHARE",
        help="Share of the cache to keep; again for more.",
        show_default="1 % to 100 %",
    ),
]
LongestOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer to --data.")
]
QuickOption = Annotated[bool, typer.Option("--quick", help="A few minutes on two CPU cores.")]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="For results; goes on from them.")
]


def evaluate(
    model: ModelOption = None,
    data: DataOption = None,
    pages: PagesOption = 250,
    suite: SuitesOption = None,
    budget: BudgetsOption = None,
    max_new_tokens: LongestOption = 32,
    quick: QuickOption = False,
    out: OutOption = Path("vlcache-eval"),
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Compare VL-Cache with the full cache, other policies, its own ablation and an oracle.

    On synthetic forms that the embedded model reads, or on your own images: a line of
    questions.jsonl is {"image": "a.png", "question": "...", "answers": ["..."]}. Each prompt is
    read once for all policies and budgets. Finished items are kept, so a run can be cut off.
    """
    suites = _checked(model, data, suite, budget, quick)
    import torch

    from vlcache_triton.apps.evaluation import BUDGETS, run, summarise

    from .vlm import VisionLanguageModel

    budgets = sorted(set(budget or (QUICK_BUDGETS if quick else BUDGETS)))
    pages = min(pages, QUICK_PAGES) if quick else pages
    settings = {"model": model, "data": data and str(data), "budgets": budgets}
    if dtype is not Dtype.auto:
        settings["dtype"] = dtype.value
    items = [] if data is None else _own_items(data, max_new_tokens)
    _check_folder(out, settings)
    vlm = VisionLanguageModel(model, device=device, dtype=dtype.value)
    if data is None:
        torch.set_num_threads(1)  # so small a model only waits for further threads
        jobs = list(_form_jobs(vlm, suites, pages, budgets))
    else:
        jobs = list(_own_jobs(vlm, items, budgets))
    _make_folder(out, settings)
    with progress("evaluating", len(jobs)) as steps:
        try:
            results = run(jobs, out / RESULTS, lambda: steps.advance(steps.task_ids[0]))
        except (ValueError, NotImplementedError, torch.OutOfMemoryError) as error:
            raise UserError(one_line(str(error))) from error
    summary = _write(out, summarise(results), _about(vlm))
    if json:
        print_json(summary)
        return
    Console().print(Markdown((out / "report.md").read_text()))
    print(f"Written to {out}: results.jsonl, summary.json, report.md and plots")


def _checked(
    model: str | None,
    data: Path | None,
    suite: Sequence[str] | None,
    budget: Sequence[float] | None,
    quick: bool,
) -> Sequence[str]:
    """The suites that the options choose, seen to fit together before anything slow is done."""
    if data is None and model is not None:
        raise UserError("data: got none, expected questions for a model of your own (--data)")
    if data is not None and (suite or quick):
        raise UserError("suite, quick: got one with --data, expected it without")
    suites = suite or (QUICK_SUITES if quick else SUITE_NAMES)
    for name in suites:
        if name not in SUITE_NAMES:
            raise UserError(f"suite: got {name!r}, expected one of {SUITE_NAMES}")
    if budget and not all(0 < b <= 1 for b in budget):
        raise UserError(f"budget: got {budget}, expected shares in (0, 1]")
    return suites


def _write(out: Path, cells: Sequence[Cell], about: dict[str, str]) -> dict[str, Any]:
    """The numbers, the page and the pictures; the numbers are returned."""
    from vlcache_triton.apps.evaluation import names, plot, plot_first, report

    summary = {"about": about, "cells": [cell.to_dict() for cell in cells]}
    (out / "summary.json").write_text(json_module.dumps(summary, indent=1) + "\n")
    (out / "report.md").write_text(report(cells, about))
    plot_first(cells, out / "accuracy.svg")
    for name in names(cells, "suite"):
        plot(cells, name, out / f"{name.replace(', ', '-').replace(' ', '-')}.png")
    return summary


def _form_jobs(
    vlm: VisionLanguageModel, suites: Sequence[str], pages: int, budgets: list[float]
) -> Iterator[Job]:
    """Suites in turn, page by page, so that a run that is cut off has of each."""
    from vlcache_triton.apps.evaluation import SUITES, Suite, encode_form, evaluate_item, form_item

    def job(suite: Suite, index: int) -> dict[str, Any]:
        item = form_item(suite, index)
        query = encode_form(vlm.processor, item, vlm.model.device)
        return evaluate_item(vlm.model, vlm.processor, item, query, budgets)

    chosen = [s for s in SUITES if s.name in suites]
    for index in range(pages):
        for suite in chosen:
            yield suite.name, index, functools.partial(job, suite, index)


def _own_items(data: Path, max_new_tokens: int) -> list[Item]:
    from vlcache_triton.apps.evaluation import read_items

    try:
        return read_items(data, max_new_tokens)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"data: cannot read {str(error.filename or data)!r}: {reason}") from error
    except ValueError as error:
        raise UserError(f"data: {one_line(str(error))}") from error


def _own_jobs(
    vlm: VisionLanguageModel, items: Sequence[Item], budgets: list[float]
) -> Iterator[Job]:
    import torch

    from vlcache_triton.apps.evaluation import Query, evaluate_item
    from vlcache_triton.apps.images import read_image

    def job(item: Item) -> dict[str, Any]:
        inputs = vlm.encode([read_image(image) for image in item.images], item.turns[0])
        query = Query(dict(inputs), torch.empty(0, dtype=torch.int64))
        return evaluate_item(vlm.model, vlm.processor, item, query, budgets)

    for item in items:
        yield item.suite, item.index, functools.partial(job, item)


def _check_folder(out: Path, settings: dict[str, Any]) -> None:
    """See that what the folder holds was measured in the same way; without results, nothing was."""
    try:
        if not (out / RESULTS).exists() or not (out / RESULTS).stat().st_size:
            return
        found = json_module.loads((out / SETTINGS).read_text())
    except OSError as error:
        raise UserError(f"out: cannot read {str(out)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"out: {str(out / SETTINGS)!r} holds no JSON: {error}") from error
    if found != settings:
        raise UserError(f"out: {str(out)!r} holds results of {found}, expected {settings}")


def _make_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, and say in it what its results will be of."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / SETTINGS).write_text(json_module.dumps(settings) + "\n")
    except OSError as error:
        raise UserError(f"out: cannot write {str(out)!r}: {error.strerror or error}") from error


def _about(vlm: VisionLanguageModel) -> dict[str, str]:
    import os

    import torch
    import transformers

    if vlm.device.type == "cuda":
        machine = torch.cuda.get_device_name(vlm.device)
    else:
        machine = f"{os.cpu_count()} CPU cores"
    return {
        "model": vlm.name,
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__},"
        f" transformers {transformers.__version__}",
    }
