"""`vlcache calibrate`: which KV heads of a model need the cache most, as a profile of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import options
from .console import UserError, count, files, print_json, progress, right
from .eval import SUITE_NAMES, DataOption, LongestOption, PagesOption

if TYPE_CHECKING:
    from vlcache_triton.recipe.profile import HeadProfile

# Of the embedded model's pages; their own, neither those of tuning nor of `vlcache eval`.
CALIBRATION_SUITES, SPLIT = ("value", "next", "list", "value, 3 turns"), "calibrate"
SHOWN_BUDGET = 0.1


def calibrate(
    model: options.ModelOption = None,
    data: DataOption = None,
    pages: PagesOption = 6,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A suite of synthetic forms, as for eval; again for more.",
            show_default="; ".join(CALIBRATION_SUITES),
        ),
    ] = None,
    policy: options.PolicyOption = options.PolicyName.vl_cache,
    preset: options.PresetOption = options.Preset.paper,
    max_new_tokens: LongestOption = 32,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the profile goes.")] = Path(
        "profile.json"
    ),
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    json: options.JsonOption = False,
) -> None:
    """Measure how much answers lose as one KV head alone keeps 1, 3, 10 or 30 % of the prompt.

    The profile that is written shares any budget out over the heads of all layers, to those first
    whose loss falls most by it. Hand it to `vl_cache(model, policy=calibrated("profile.json"))`, or
    to `vlcache eval --profile`. The answers are the full cache's own. It pays for some questions
    and costs others, above all such as it has not seen: compare before you use it.
    """
    if data is None and model is not None:
        raise UserError("data: got none, expected questions for a model of your own (--data)")
    if data is not None and suite:
        raise UserError("suite: got one with --data, expected it without")
    suites = options.checked_names("suite", suite or CALIBRATION_SUITES, SUITE_NAMES)
    config = options.checked_config(SHOWN_BUDGET, preset, policy)
    from vlcache_triton.apps.evaluation import Variant
    from vlcache_triton.apps.evaluation.calibrate import calibrate as measure

    from .questions import own_items, questions_of
    from .vlm import VisionLanguageModel, refusals

    items = [] if data is None else own_items(data, max_new_tokens)
    vlm = VisionLanguageModel(model, device=device, dtype=dtype.value)
    questions = questions_of(vlm, items, suites, pages, SPLIT)
    about = f"{count(pages, 'synthetic form')} of each of {', '.join(map(repr, suites))}"
    if data is not None:
        about = f"{count(len(items), 'question')} of {data.name}"
    ranked_by = policy.value if preset is options.Preset.paper else preset.value
    variant = Variant(ranked_by, config, policy.load())
    asked = (question.load() for question in questions)
    queries = ((query, item.max_new_tokens) for item, query in asked)
    with progress("calibrating", len(questions)) as advance, refusals():
        profile = measure(vlm.model, queries, variant, about, advance=advance)
    with files("out", "write", out):
        profile.write(out)
    if json:
        print_json(profile.to_dict())
    else:
        _print(profile)
        print(f"Written to {out}")


def _print(profile: HeadProfile) -> None:
    """The share of each head at a budget."""
    shares = profile.shares(SHOWN_BUDGET)
    heads = (right(f"KV head {head}") for head in range(len(shares[0])))
    table = Table(right("layer"), *heads, title=f"{SHOWN_BUDGET:.0%} of the cache, by head")
    for layer, row in enumerate(shares):
        table.add_row(str(layer), *(f"{share:.1%}" for share in row))
    Console().print(table)
