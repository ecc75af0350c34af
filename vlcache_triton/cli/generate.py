"""`vlcache generate`: one answer from a compressed cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .console import checked_config, print_json, progress, size, waiting


def generate(
    image: Annotated[list[Path], typer.Option(help="An image; give the option again for more.")],
    prompt: Annotated[str, typer.Option(help="What to ask about the images.")],
    model: Annotated[
        str | None, typer.Option(help="A model of the hub, or its folder. [default: form-reader]")
    ] = None,
    budget: Annotated[float, typer.Option(help="Share of the KV cache to keep, in (0, 1].")] = 0.1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Answer a prompt about images from a compressed KV cache, greedily.

    Any model that Transformers loads as AutoModelForImageTextToText and VL-Cache supports; none
    may bring code of its own. Bytes are those of the prompt's cache: generated tokens are never
    compressed.
    """
    config = checked_config(budget)
    with waiting("starting"):
        from .vlm import VisionLanguageModel, open_images

    images = open_images(image)
    vlm = VisionLanguageModel(model)
    inputs = vlm.encode(images, prompt)
    with progress("generating", max_new_tokens) as steps:
        answer = vlm.answer(inputs, config, max_new_tokens, steps)
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
                "prompt_tokens": prompt_tokens,
                "new_tokens": answer.num_tokens,
                "kv_bytes": answer.kv_bytes,
                "full_kv_bytes": full_bytes,
                "kept": answer.kept,
                "seconds": answer.seconds,
            }
        )
        return
    print(answer.text)
    Console(stderr=True).print(
        f"{prompt_tokens} prompt tokens; KV cache {size(full_bytes)} → {size(answer.kv_bytes)};"
        f" {answer.num_tokens} tokens in {answer.seconds:.1f} s",
        style="dim",
        highlight=False,
    )
