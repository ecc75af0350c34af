"""`vlcache eval`: how well compressed caches answer, against the full one and every rival."""

from __future__ import annotations

import functools
import json as json_module
import platform
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from .console import UserError, one_line, print_json, progress

if TYPE_CHECKING:
    from .vlm import VisionLanguageModel

QUICK_PAGES = 6
QUICK_SUITES = ["value", "next", "value, 3 turns"]
QUICK_BUDGETS = [0.05, 0.1, 0.2, 0.4]

#: (suite, index, how to evaluate it).
Job = tuple[str, int, Callable[[], dict[str, Any]]]


def evaluate(
    model: Annotated[
        str | None, typer.Option(help="A model of the hub, or its folder. [default: form-reader]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Your questions: a folder with questions.jsonl, or such a file."),
    ] = None,
    pages: Annotated[int, typer.Option(min=1, help="Synthetic forms a suite.")] = 250,
    suite: Annotated[
        list[str] | None, typer.Option(help="A suite; again for more. [default: all]")
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Share of the cache to keep; again for more. [default: 1 % to 100 %]"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer to --data.")] = 32,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes on two CPU cores.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for results; goes on from them.")] = Path(
        "vlcache-eval"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Compare VL-Cache with the full cache, other policies, its own ablation and hindsight.

    On synthetic forms that the embedded model reads, or on your own images: a line of
    questions.jsonl is {"image": "a.png", "question": "...", "answers": ["..."]}. Each prompt is
    read once for all policies and budgets. Finished items are kept, so a run can be cut off.
    """
    from vlcache_triton.evaluation import BUDGETS, SUITES, plot, report, run, summarise
    from vlcache_triton.evaluation.summary import names

    if data is None and model is not None:
        raise UserError("data: got none, expected questions for a model of your own (--data)")
    if data is not None and (suite or quick):
        raise UserError("suite, quick: got one with --data, expected it without")
    known = [s.name for s in SUITES]
    suites = suite or (QUICK_SUITES if quick else known)
    for name in suites:
        if name not in known:
            raise UserError(f"suite: got {name!r}, expected one of {known}")
    budgets = sorted(set(budget or (QUICK_BUDGETS if quick else BUDGETS)))
    if not all(0 < b <= 1 for b in budgets):
        raise UserError(f"budget: got {budgets}, expected shares in (0, 1]")
    pages = min(pages, QUICK_PAGES) if quick else pages
    _check_folder(out, {"model": model, "data": data and str(data), "budgets": budgets})

    import torch

    from .vlm import VisionLanguageModel

    vlm = VisionLanguageModel(model)
    if data is None:
        torch.set_num_threads(1)  # so small a model only waits for further threads
        jobs = list(_form_jobs(vlm, suites, pages, budgets))
    else:
        jobs = list(_own_jobs(vlm, data, max_new_tokens, budgets))
    with progress("evaluating", len(jobs)) as steps:
        try:
            results = run(jobs, out / "results.jsonl", lambda: steps.advance(steps.task_ids[0]))
        except (ValueError, NotImplementedError) as error:
            raise UserError(one_line(str(error))) from error
    cells = summarise(results)
    about = _about(vlm)
    summary = {"about": about, "cells": [cell.to_dict() for cell in cells]}
    (out / "summary.json").write_text(json_module.dumps(summary, indent=1) + "\n")
    page = report(cells, about)
    (out / "report.md").write_text(page)
    for name in names(cells, "suite"):
        plot(cells, name, out / f"{name.replace(', ', '-').replace(' ', '-')}.png")
    if json:
        print_json(summary)
        return
    Console().print(Markdown(page))
    print(f"Written to {out}: results.jsonl, summary.json, report.md and plots")


def _form_jobs(
    vlm: VisionLanguageModel, suites: list[str], pages: int, budgets: list[float]
) -> Iterator[Job]:
    """Suites in turn, page by page, so that a run that is cut off has of each."""
    from vlcache_triton.evaluation import SUITES, Suite, encode_form, evaluate_item, form_item

    def job(suite: Suite, index: int) -> dict[str, Any]:
        item = form_item(suite, index)
        query = encode_form(vlm.processor, item, vlm.model.device)
        return evaluate_item(vlm.model, vlm.processor, item, query, budgets)

    chosen = [s for s in SUITES if s.name in suites]
    for index in range(pages):
        for suite in chosen:
            yield suite.name, index, functools.partial(job, suite, index)


def _own_jobs(
    vlm: VisionLanguageModel, data: Path, max_new_tokens: int, budgets: list[float]
) -> Iterator[Job]:
    import torch

    from vlcache_triton.evaluation import Item, Query, evaluate_item, read_items

    def job(item: Item) -> dict[str, Any]:
        inputs = vlm.encode(item.images, item.turns[0])
        query = Query(dict(inputs), torch.empty(0, dtype=torch.int64))
        return evaluate_item(vlm.model, vlm.processor, item, query, budgets)

    try:
        for item in read_items(data, max_new_tokens):
            yield item.suite, item.index, functools.partial(job, item)
    except (OSError, ValueError) as error:
        raise UserError(f"data: {one_line(str(error))}") from error


def _check_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or see that what it holds was measured in the same way."""
    path = out / "settings.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found = json_module.loads(path.read_text())
            if found != settings:
                raise UserError(f"out: {str(out)!r} holds results of {found}, expected {settings}")
        else:
            path.write_text(json_module.dumps(settings) + "\n")
    except OSError as error:
        raise UserError(f"out: cannot write {str(out)!r}: {error.strerror or error}") from error


def _about(vlm: VisionLanguageModel) -> dict[str, str]:
    import os

    import torch
    import transformers

    if vlm.device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{os.cpu_count()} CPU cores"
    return {
        "model": vlm.name,
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__},"
        f" transformers {transformers.__version__}",
    }
