"""`vlcache eval`: how well compressed caches answer, against the full one and every rival."""

from __future__ import annotations

import functools
import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from .console import UserError, files, one_line, print_json, progress
from .folder import check_folder, make_folder
from .options import DeviceOption, Dtype, DtypeOption, JsonOption, ModelOption, checked_names

if TYPE_CHECKING:
    from vlcache_triton.apps.evaluation import Cell, Comparison

# The names of vlcache_triton.apps.evaluation.SUITES, which take torch to import.
SUITE_NAMES = ("value", "field", "count", "next", "list", "value, 2 images", "value, 3 turns")
SPLIT = "test"
QUICK_PAGES = 6
QUICK_SUITES = ["value", "next", "value, 3 turns"]
QUICK_BUDGETS = [0.05, 0.1, 0.2, 0.4]
RESULTS = "results.jsonl"


DataOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Your questions: questions.jsonl, or the folder that has it."
    ),
]
PagesOption = Annotated[int, typer.Option(min=1, metavar="N", help="Synthetic forms a suite.")]
SuitesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help=f"A suite of synthetic forms; again for more. {'; '.join(SUITE_NAMES)}.",
        show_default="all",
    ),
]
BudgetsOption = Annotated[
    list[float] | None,
    typer.Option(
        metavar="SHARE",
        help="Share of the cache to keep; again for more.",
        show_default="1 % to 100 %",
    ),
]
LongestOption = Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer to --data.")]
ProfileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Of calibrate: compares with it and without, in place of rivals."
    ),
]
SplitOption = Annotated[
    str, typer.Option(metavar="NAME", help="Which synthetic forms: another name, others.")
]
VariantsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Compare this one, as reports name it; again for more.",
        show_default="all",
    ),
]
QuickOption = Annotated[bool, typer.Option("--quick", help="A few minutes on two CPU cores.")]
OutOption = Annotated[Path, typer.Option(metavar="FOLDER", help="For results; goes on from them.")]


def evaluate(
    model: ModelOption = None,
    data: DataOption = None,
    pages: PagesOption = 250,
    suite: SuitesOption = None,
    budget: BudgetsOption = None,
    max_new_tokens: LongestOption = 32,
    profile: ProfileOption = None,
    split: SplitOption = SPLIT,
    variant: VariantsOption = None,
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
    suites = _checked(model, data, suite, budget, quick, split)
    from vlcache_triton.apps.evaluation import BUDGETS, compare_all, run, summarise

    from .questions import evaluations, own_items, questions_of
    from .vlm import VisionLanguageModel, about, refusals

    budgets = sorted(set(budget or (QUICK_BUDGETS if quick else BUDGETS)))
    pages = min(pages, QUICK_PAGES) if quick else pages
    settings: dict[str, Any] = {"model": model, "data": data and str(data), "budgets": budgets}
    if dtype is not Dtype.auto:
        settings["dtype"] = dtype.value
    compare: Comparison = compare_all
    if profile is not None:
        settings["profile"] = str(profile)
        compare = _with_and_without(profile)
    if split != SPLIT:
        settings["split"] = split
    if variant:
        settings["variants"] = sorted(set(variant))
        compare = _alone(compare, variant)
    items = [] if data is None else own_items(data, max_new_tokens)
    check_folder(out, settings, RESULTS)
    vlm = VisionLanguageModel(model, device=device, dtype=dtype.value)
    questions = questions_of(vlm, items, suites, pages, split)
    jobs = evaluations(vlm, questions, budgets, compare)
    make_folder(out, settings)
    with progress("evaluating", len(jobs)) as advance, refusals():
        results = run(jobs, out / RESULTS, advance)
    summary = _write(out, summarise(results), about(vlm.name, vlm.device))
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
    split: str,
) -> Sequence[str]:
    """The suites that the options choose, seen to fit together before anything slow is done."""
    if data is None and model is not None:
        raise UserError("data: got none, expected questions for a model of your own (--data)")
    if data is not None and (suite or quick or split != SPLIT):
        raise UserError("suite, split, quick: got one with --data, expected it without")
    suites = checked_names("suite", suite or (QUICK_SUITES if quick else None), SUITE_NAMES)
    if budget and not all(0 < b <= 1 for b in budget):
        raise UserError(f"budget: got {budget}, expected shares in (0, 1]")
    return suites


def _with_and_without(path: Path) -> Comparison:
    """The paper's recipe and the tuned preset, each with the profile and without."""
    from vlcache_triton.apps.evaluation.variants import with_profile
    from vlcache_triton.recipe.profile import read_profile

    try:
        with files("profile", "read", path):
            return functools.partial(with_profile, read_profile(path))
    except ValueError as error:
        raise UserError(one_line(str(error))) from error


def _alone(compare: Comparison, chosen: Sequence[str]) -> Comparison:
    """Of a comparison, what is chosen by name."""
    import torch

    known = [v.name for v in compare(0.1, torch.empty(0))]
    checked_names("variant", chosen, known)
    return lambda budget, attention: [v for v in compare(budget, attention) if v.name in chosen]


def _write(out: Path, cells: Sequence[Cell], about: dict[str, str]) -> dict[str, Any]:
    """The numbers, the page and the pictures; the numbers are returned."""
    from vlcache_triton.apps.evaluation import names, plot, plot_first, report

    summary = {"about": about, "cells": [vars(cell) for cell in cells]}
    (out / "summary.json").write_text(json_module.dumps(summary, indent=1) + "\n")
    (out / "report.md").write_text(report(cells, about))
    plot_first(cells, out / "accuracy.svg")
    for name in names(cells, "suite"):
        plot(cells, name, out / f"{name.replace(', ', '-').replace(' ', '-')}.png")
    return summary
