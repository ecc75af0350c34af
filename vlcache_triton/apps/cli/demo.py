"""`vlcache demo`: a page, some questions, and their answers from the full and a smaller cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlcache_triton import VLCacheConfig

from .console import UserError, print_json, progress, waiting
from .demo_tables import print_demo
from .options import (
    FORM_READER_BUDGETS,
    PRESET_HELP,
    BudgetOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    PolicyName,
    PolicyOption,
    Preset,
    StreamingOption,
    checked_config,
)

if TYPE_CHECKING:
    from vlcache_triton.apps.formreader import Task

    from .vlm import Answer

DEFAULT_PRESET = Preset.tuned
DEFAULT_BUDGET = FORM_READER_BUDGETS[DEFAULT_PRESET]
DEFAULT_SEED = 6  # the first page that is read without a mistake from a tenth of the cache as well
SWEEP = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)


def demo(
    budget: BudgetOption = DEFAULT_BUDGET,
    policy: PolicyOption = PolicyName.vl_cache,
    preset: Annotated[
        Preset | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help=PRESET_HELP,
            show_default="tuned; paper with another policy",
        ),
    ] = None,
    streaming: StreamingOption = False,
    questions: Annotated[
        int, typer.Option(min=1, max=100, metavar="N", help="How many to ask.")
    ] = 5,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Another seed is another page.")
    ] = DEFAULT_SEED,
    fields: Annotated[
        int, typer.Option(min=1, max=144, metavar="N", help="Fields on the page.")
    ] = 8,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the page.")] = Path(
        "vlcache-demo.png"
    ),
    sweep: Annotated[bool, typer.Option("--sweep", help="Show where answers break.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Draw a form, ask the embedded model about it; answer from the full and a smaller KV cache.

    The model is tiny and spreads attention over blank paper: with the paper's recipe it needs 60 %
    of its cache, and a tenth where a row stands for what is evicted. Bytes are those of the
    prompt's cache: generated tokens are never compressed. Seconds are of prefill, compression and
    decoding together.
    """
    if preset is None:
        preset = DEFAULT_PRESET if policy is PolicyName.vl_cache else Preset.paper
    config = checked_config(budget, preset, policy, streaming)
    with waiting("starting"):
        from vlcache_triton.apps.formreader import MAX_ANSWER_TOKENS, draw_form, render_form

        from .vlm import VisionLanguageModel

    # What the model is good at, full cache or not: it finds values and neighbours.
    good_at: tuple[Task, ...] = ("value", "next")
    tasks = [good_at[i % 2] for i in range(questions)]
    dialogue = draw_form(f"demo-{seed}", tasks, fields)
    page = render_form(dialogue.pages[0])
    try:
        page.save(out, format="PNG")
    except OSError as error:
        raise UserError(f"out: cannot write {str(out)!r}: {error.strerror or error}") from error

    vlm = VisionLanguageModel(None, device=device, dtype=dtype.value)
    ask = functools.partial(vlm.answer, policy=policy.load(), streaming=streaming)
    lossless = VLCacheConfig(budget=1.0)
    swept = [checked_config(b, preset, policy) for b in SWEEP if sweep]
    answers: dict[VLCacheConfig, list[Answer]] = {c: [] for c in (lossless, config, *swept)}
    with progress("answering", len(answers) * questions) as steps:
        for question in dialogue.questions:
            inputs = vlm.encode([page], question.text)
            for choice, given in answers.items():
                if not given:  # the first call of a path pays for imports and compilation
                    ask(inputs, choice, 2)
                given.append(ask(inputs, choice, MAX_ANSWER_TOKENS))
                steps.advance(steps.task_ids[0])

    full, compressed = answers[lossless], answers[config]
    result: dict[str, Any] = {
        "model": vlm.name,
        "page": str(out),
        "seed": seed,
        "fields": fields,
        "policy": policy.value,
        "preset": preset.value,
        "questions": [
            {
                "question": question.text,
                "expected": question.answer,
                "full": _summary(whole),
                "compressed": _summary(part) | {"budget": budget, "kept": part.kept},
            }
            for question, whole, part in zip(dialogue.questions, full, compressed, strict=True)
        ],
    }
    if sweep:
        right = [question.answer for question in dialogue.questions]
        result["sweep"] = [_sweep_row(c.budget, right, full, answers[c]) for c in swept]
    if json:
        print_json(result)
    else:
        print_demo(result)


def _summary(answer: Answer) -> dict[str, Any]:
    return {"answer": answer.text, "kv_bytes": answer.kv_bytes, "seconds": answer.seconds}


def _sweep_row(
    budget: float, right: Sequence[str], full: Sequence[Answer], compressed: Sequence[Answer]
) -> dict[str, Any]:
    texts = [answer.text for answer in compressed]
    return {
        "budget": budget,
        "answers": texts,
        "right": sum(map(eq, texts, right)),
        "same_as_full": sum(map(eq, texts, (answer.text for answer in full))),
        "kv_bytes": sum(answer.kv_bytes for answer in compressed) // len(compressed),
    }
