"""`vlcache inspect`: what compression would do to one prompt, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .console import UserError, bar, checked_config, print_json, size, waiting

if TYPE_CHECKING:
    from vlcache_triton.report import CompressionReport


def inspect(
    image: Annotated[list[Path], typer.Option(help="An image; give the option again for more.")],
    prompt: Annotated[str, typer.Option(help="What to ask about the images.")],
    model: Annotated[
        str | None, typer.Option(help="A model of the hub, or its folder. [default: form-reader]")
    ] = None,
    budget: Annotated[float, typer.Option(help="Share of the KV cache to keep, in (0, 1).")] = 0.1,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show the sparsity that each layer's attention has on a prompt, and what it may keep.

    Sparsity is the share of the attention entries of the text after the last image that are
    below 1 % of their row's maximum (the paper's γ', eq. 2). Nothing is generated.
    """
    config = checked_config(budget)
    if config.is_lossless:
        raise UserError("budget: got 1, which keeps all and measures nothing; expected < 1")
    with waiting("starting"):
        from .vlm import VisionLanguageModel, open_images

    images = open_images(image)
    vlm = VisionLanguageModel(model)
    with waiting("reading the prompt"):
        report = vlm.answer(vlm.encode(images, prompt), config, 1).report
    if report is None:
        raise UserError("image: the processor made no image tokens, so nothing was compressed")
    if json:
        paths = [str(path) for path in image]
        print_json({"model": vlm.name, "images": paths, "prompt": prompt, **report.to_dict()})
        return
    _print(report)


def _print(report: CompressionReport) -> None:
    (length,) = report.lengths
    table = Table(
        title=f"{length} prompt tokens, budget {report.budget:g}: KV cache"
        f" {size(report.bytes_before)} → {size(report.bytes_after)}",
    )
    table.add_column("layer", justify="right")
    table.add_column("sparsity γ'", justify="right")
    table.add_column("")
    table.add_column("kept", justify="right")
    table.add_column("of prompt", justify="right")
    table.add_column("")
    for layer, (sparsity,), (kept,) in zip(
        report.layers, report.sparsity, report.kept, strict=True
    ):
        assert sparsity is not None, "a report of one sequence is one of a compressed sequence"
        share = kept / length
        table.add_row(
            str(layer), f"{sparsity:.3f}", bar(sparsity), str(kept), f"{share:.1%}", bar(share)
        )
    Console().print(table)
