"""`vlcache demo`: a page, some questions, and their answers from the full and a smaller cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlcache_triton import VLCacheConfig

from . import options
from .console import files, print_json, progress, waiting
from .demo_tables import print_demo

if TYPE_CHECKING:
    from vlcache_triton.apps.formreader import Dialogue, Task

    from .vlm import Answer

DEFAULT_PRESET = options.Preset.tuned
DEFAULT_BUDGET = options.FORM_READER_BUDGETS[DEFAULT_PRESET]
DEFAULT_SEED = 6  # the first page that is read without a mistake from a tenth of the cache as well
SWEEP = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)


DemoPresetOption = Annotated[
    options.Preset | None,
    typer.Option(
        metavar="NAME", help=options.PRESET_HELP, show_default="tuned; paper with another policy"
    ),
]
QuestionsOption = Annotated[int, typer.Option(min=1, max=100, metavar="N", help="How many to ask.")]
SeedOption = Annotated[int, typer.Option(metavar="N", help="Another seed is another page.")]
FieldsOption = Annotated[int, typer.Option(min=1, max=144, metavar="N", help="Fields on the page.")]
PageOption = Annotated[Path, typer.Option(metavar="FILE", help="Where to write the page.")]
SweepOption = Annotated[bool, typer.Option("--sweep", help="Show where answers break.")]


def demo(
    budget: options.BudgetOption = DEFAULT_BUDGET,
    policy: options.PolicyOption = options.PolicyName.vl_cache,
    preset: DemoPresetOption = None,
    streaming: options.StreamingOption = False,
    questions: QuestionsOption = 5,
    seed: SeedOption = DEFAULT_SEED,
    fields: FieldsOption = 8,
    out: PageOption = Path("vlcache-demo.png"),
    sweep: SweepOption = False,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    json: options.JsonOption = False,
) -> None:
    """Draw a form, ask the embedded model about it; answer from the full and a smaller KV cache.

    The model is tiny and spreads attention over blank paper: with the paper's recipe it needs 60 %
    of its cache, and a tenth where a row stands for what is evicted. Bytes are those of the
    prompt's cache: generated tokens are never compressed. Seconds are of prefill, compression and
    decoding together.
    """
    if preset is None:
        preset = DEFAULT_PRESET if policy is options.PolicyName.vl_cache else options.Preset.paper
    config = options.checked_config(budget, preset, policy, streaming)
    with waiting("starting"):
        from vlcache_triton.apps.formreader import draw_form, render_form

        from .vlm import VisionLanguageModel

    # What the model is good at, full cache or not: it finds values and neighbours.
    good_at: tuple[Task, ...] = ("value", "next")
    dialogue = draw_form(f"demo-{seed}", [good_at[i % 2] for i in range(questions)], fields)
    page = render_form(dialogue.pages[0])
    with files("out", "write", out):
        page.save(out, format="PNG")

    vlm = VisionLanguageModel(None, device=device, dtype=dtype.value)
    ask = functools.partial(vlm.answer, policy=policy.load(), streaming=streaming)
    lossless = VLCacheConfig(budget=1.0)
    swept = [options.checked_config(b, preset, policy) for b in SWEEP if sweep]
    inputs = [vlm.encode([page], question.text) for question in dialogue.questions]
    answers = _ask_all(ask, inputs, dict.fromkeys((lossless, config, *swept)))
    full, compressed = answers[lossless], answers[config]
    result: dict[str, Any] = {
        "model": vlm.name,
        "page": str(out),
        "seed": seed,
        "fields": fields,
        "policy": policy.value,
        "preset": preset.value,
        "questions": _asked(dialogue, full, compressed, budget),
    }
    if sweep:
        right = [question.answer for question in dialogue.questions]
        result["sweep"] = [_sweep_row(c.budget, right, full, answers[c]) for c in swept]
    if json:
        print_json(result)
    else:
        print_demo(result)


def _ask_all(
    ask: Callable[[Any, VLCacheConfig, int], Answer],
    inputs: Sequence[Any],
    choices: Iterable[VLCacheConfig],
) -> dict[VLCacheConfig, list[Answer]]:
    """Each prompt's answer from each choice of cache, question by question."""
    from vlcache_triton.apps.formreader import MAX_ANSWER_TOKENS

    answers: dict[VLCacheConfig, list[Answer]] = {choice: [] for choice in choices}
    with progress("answering", len(answers) * len(inputs)) as advance:
        for prompt in inputs:
            for choice, given in answers.items():
                if not given:  # the first call of a path pays for imports and compilation
                    ask(prompt, choice, 2)
                given.append(ask(prompt, choice, MAX_ANSWER_TOKENS))
                advance()
    return answers


def _asked(
    dialogue: Dialogue, full: Sequence[Answer], compressed: Sequence[Answer], budget: float
) -> list[dict[str, Any]]:
    return [
        {
            "question": question.text,
            "expected": question.answer,
            "full": _summary(whole),
            "compressed": _summary(part) | {"budget": budget, "kept": part.kept},
        }
        for question, whole, part in zip(dialogue.questions, full, compressed, strict=True)
    ]


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
