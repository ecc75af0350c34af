"""`vlcache generate`: one answer from a compressed cache."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from .console import print_json, progress, size, waiting
from .options import (
    FORM_READER_BUDGETS,
    BudgetOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ImageOption,
    JsonOption,
    ModelOption,
    PolicyName,
    PolicyOption,
    Preset,
    PresetOption,
    PromptOption,
    StreamingOption,
    checked_config,
)


def generate(
    image: ImageOption,
    prompt: PromptOption,
    model: ModelOption = None,
    budget: BudgetOption = 0.1,
    policy: PolicyOption = PolicyName.vl_cache,
    preset: PresetOption = Preset.paper,
    streaming: StreamingOption = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer.")] = 128,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Answer a prompt about images from a compressed KV cache, greedily.

    Any model that Transformers loads as AutoModelForImageTextToText and VL-Cache supports; none
    may bring code of its own. Bytes are those of the prompt's cache: generated tokens are never
    compressed.
    """
    config = checked_config(budget, preset, policy, streaming)
    with waiting("starting"):
        from .vlm import VisionLanguageModel, open_images

    images = open_images(image)
    vlm = VisionLanguageModel(model, device=device, dtype=dtype.value)
    inputs = vlm.encode(images, prompt)
    with progress("generating", max_new_tokens) as steps:
        answer = vlm.answer(
            inputs, config, max_new_tokens, steps, policy=policy.load(), streaming=streaming
        )
    borne = FORM_READER_BUDGETS[preset]
    is_short = model is None and budget < borne and policy is not PolicyName.full
    note = (
        f"{vlm.name} bears budgets down to {borne:g} with --preset {preset.value}; at {budget:g}"
        " expect wrong answers (see vlcache demo --sweep)"
    )
    report = answer.report
    prompt_tokens = int(inputs["input_ids"].shape[1])
    full_bytes = report.bytes_before if report else answer.kv_bytes
    if json:
        print_json(
            {
                "model": vlm.name,
                "images": [str(path) for path in image],
                "prompt": prompt,
                "answer": answer.text,
                "budget": budget,
                "policy": policy.value,
                "preset": preset.value,
                "prompt_tokens": prompt_tokens,
                "new_tokens": answer.num_tokens,
                "kv_bytes": answer.kv_bytes,
                "full_kv_bytes": full_bytes,
                "kept": answer.kept,
                "seconds": answer.seconds,
                "note": note if is_short else None,
            }
        )
        return
    print(answer.text)
    console = Console(stderr=True, highlight=False)
    console.print(
        f"{prompt_tokens} prompt tokens; KV cache {size(full_bytes)} → {size(answer.kv_bytes)};"
        f" {answer.num_tokens} tokens in {answer.seconds:.1f} s",
        style="dim",
    )
    if is_short:
        console.print(note, style="yellow")
