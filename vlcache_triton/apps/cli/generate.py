"""`vlcache generate`: one answer from a compressed cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from . import options
from .console import print_json, progress, size, waiting

if TYPE_CHECKING:
    from .vlm import Answer


def generate(
    image: options.ImageOption,
    prompt: options.PromptOption,
    model: options.ModelOption = None,
    budget: options.BudgetOption = 0.1,
    policy: options.PolicyOption = options.PolicyName.vl_cache,
    preset: options.PresetOption = options.Preset.paper,
    streaming: options.StreamingOption = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer.")] = 128,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    json: options.JsonOption = False,
) -> None:
    """Answer a prompt about images from a compressed KV cache, greedily.

    Any model that Transformers loads as AutoModelForImageTextToText and VL-Cache supports; none
    may bring code of its own. Bytes are those of the prompt's cache: generated tokens are never
    compressed.
    """
    config = options.checked_config(budget, preset, policy, streaming)
    with waiting("starting"):
        from .vlm import VisionLanguageModel, open_images

    images = open_images(image)
    vlm = VisionLanguageModel(model, device=device, dtype=dtype.value)
    inputs = vlm.encode(images, prompt)
    with progress("generating", max_new_tokens) as advance:
        answer = vlm.answer(
            inputs, config, max_new_tokens, advance, policy=policy.load(), streaming=streaming
        )
    prompt_tokens = int(inputs["input_ids"].shape[1])
    full_bytes = answer.report.bytes_before if answer.report else answer.kv_bytes
    note = _note(model, budget, policy, preset)
    if not json:
        _print(answer, prompt_tokens, full_bytes, note)
        return
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
            "note": note,
        }
    )


def _note(
    model: str | None, budget: float, policy: options.PolicyName, preset: options.Preset
) -> str | None:
    """What to say of a budget that the embedded model does not bear."""
    borne = options.FORM_READER_BUDGETS[preset]
    if model is not None or budget >= borne or policy is options.PolicyName.full:
        return None
    return (
        f"form-reader bears budgets down to {borne:g} with --preset {preset.value}; at {budget:g}"
        " expect wrong answers (see vlcache demo --sweep)"
    )


def _print(answer: Answer, prompt_tokens: int, full_bytes: int, note: str | None) -> None:
    print(answer.text)
    console = Console(stderr=True, highlight=False)
    console.print(
        f"{prompt_tokens} prompt tokens; KV cache {size(full_bytes)} → {size(answer.kv_bytes)};"
        f" {answer.num_tokens} tokens in {answer.seconds:.1f} s",
        style="dim",
    )
    if note:
        console.print(note, style="yellow")
