"""`vlcache reproduce`: the paper's tables for a model, in one command that can be cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from .console import UserError, print_json
from .eval import SUITE_NAMES, BudgetsOption, DataOption, LongestOption, OutOption, SuitesOption
from .folder import check_folder, make_folder
from .options import DeviceOption, Dtype, DtypeOption, JsonOption, ModelOption, checked_names

# The names of reproduce_parts.PARTS, and below of vlcache_triton.apps.reproduce.TASKS, which take
# torch to import.
PART_NAMES = ("accuracy", "ablation", "sparsity", "latency")
TASK_NAMES = ("coco2014_cap_val", "docvqa_val", "mathvista_testmini_format")
SAMPLES = 250  # of each task, as in the paper
BUDGETS = [0.01, 0.05, 0.1, 0.2, 0.4]
BATCHES, LENGTHS = [1, 4, 16], [2048, 8192, 32768]

PartsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help=f"What to measure; again for more. {', '.join(PART_NAMES)}.",
        show_default="all",
    ),
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A task of lmms-eval; again for more.",
        show_default=", ".join(TASK_NAMES),
    ),
]
LimitOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="Samples of each task, or forms a suite.")
]
BatchesOption = Annotated[
    list[int] | None,
    typer.Option(
        min=1, metavar="N", help="Prompts at once; again for more.", show_default="1 4 16"
    ),
]
LengthsOption = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Tokens of a prompt, for latency; again for more.",
        show_default="2048 8192 32768",
    ),
]
NewTokensOption = Annotated[int, typer.Option(min=45, metavar="N", help="Decoded, for latency.")]


def reproduce(
    model: ModelOption = None,
    data: DataOption = None,
    part: PartsOption = None,
    budget: BudgetsOption = None,
    task: TasksOption = None,
    suite: SuitesOption = None,
    limit: LimitOption = SAMPLES,
    batch: BatchesOption = None,
    length: LengthsOption = None,
    new_tokens: NewTokensOption = 100,
    max_new_tokens: LongestOption = 32,
    out: OutOption = Path("vlcache-reproduced"),
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Measure what the VL-Cache paper has tables of, for one model, and write a page with figures.

    Accuracy against budget for every policy; the recipe's choices one at a time; sparsity by layer,
    in prefill and decoding; latency by batch and length. Questions are those of COCO captions,
    DocVQA and MathVista through lmms-eval, or yours with --data (see vlcache eval); the embedded
    model is asked about synthetic forms. What is finished is kept, so a run can be cut off.
    """
    parts = checked_names("part", part, PART_NAMES)
    suites = checked_names("suite", suite, SUITE_NAMES)
    budgets = sorted(set(budget or BUDGETS))
    if not all(0 < b < 1 for b in budgets):
        raise UserError(f"budget: got {budgets}, expected shares in (0, 1)")
    from vlcache_triton.apps.reproduce import Findings, has_lmms_eval, write_page

    from .questions import own_items
    from .reproduce_parts import PARTS, Plan
    from .vlm import EMBEDDED, about, choose_device

    items = [] if data is None else own_items(data, max_new_tokens)
    shapes = [(b, n) for b in batch or BATCHES for n in length or LENGTHS]
    asked = (items, suites, task or list(TASK_NAMES), budgets, limit)
    plan = Plan(model, *asked, shapes, new_tokens, device, dtype.value, out)
    if plan.through_lmms and {"accuracy", "ablation"} & {*parts} and not has_lmms_eval():
        raise UserError(
            "model: got no lmms-eval for its tasks, expected pip install lmms-eval==0.7.3, or"
            " questions of your own (--data)"
        )
    check_folder(out, plan.settings(data), "**/*.json*")
    make_folder(out, plan.settings(data))
    said = about(model or EMBEDDED, choose_device(device))
    found = {name: PARTS[name](plan) for name in PART_NAMES if name in parts}
    page = write_page(Findings(said, **found, failed=plan.failed), out)
    if json:
        scores = {
            k: [x._asdict() for x in found[k]] for k in ("accuracy", "ablation") if k in found
        }
        print_json({"about": said, "failed": plan.failed, **found, **scores})
        return
    Console().print(Markdown(page))
    print(f"Written to {out}: report.md, figures, and a JSON file for each part")
