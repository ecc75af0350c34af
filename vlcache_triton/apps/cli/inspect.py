"""`vlcache inspect`: what compression would do to one prompt, layer by layer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vlcache_triton import VLCacheConfig

from . import options
from .console import UserError, bar, files, print_json, right, size, waiting

if TYPE_CHECKING:
    from PIL import Image

    from vlcache_triton.apps.evaluation import Variant
    from vlcache_triton.recipe.report import CompressionReport

    from .vlm import VisionLanguageModel


DrawOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Also draw pictures of what is kept, by layer and summed, in here."
    ),
]


def inspect(
    image: options.ImageOption,
    prompt: options.PromptOption,
    model: options.ModelOption = None,
    budget: options.BudgetOption = 0.1,
    policy: options.PolicyOption = options.PolicyName.vl_cache,
    preset: options.PresetOption = options.Preset.paper,
    out: DrawOption = None,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    json: options.JsonOption = False,
) -> None:
    """Show the sparsity that each layer's attention has on a prompt, and what it may keep.

    Sparsity is the share of the attention entries of the text after the last image that are
    below 1 % of their row's maximum (the paper's γ', eq. 2); with another policy, of the rows that
    it scores by. Nothing is generated.
    """
    config = options.checked_config(budget, preset, policy)
    if config.is_lossless or policy is options.PolicyName.full:
        name, got = ("policy", "full") if policy is options.PolicyName.full else ("budget", 1)
        raise UserError(f"{name}: got {got}, which keeps all and measures nothing")
    with waiting("starting"):
        from vlcache_triton.apps.evaluation import Variant

        from .vlm import VisionLanguageModel, open_images

    images = open_images(image)
    vlm = VisionLanguageModel(model, device=device, dtype=dtype.value)
    inputs = vlm.encode(images, prompt)
    variant = Variant("inspected", config, policy.load())
    if out is None:
        with waiting("reading the prompt"):
            report = vlm.answer(inputs, config, 1, policy=variant.policy).report
        pictures: list[Path] = []
    else:
        report, pictures = _draw(out, images, vlm, inputs, variant)
    if report is None:
        raise UserError("image: the processor made no image tokens, so nothing was compressed")
    if json:
        paths = [str(path) for path in image]
        drawn = [str(path) for path in pictures]
        print_json(
            {
                "model": vlm.name,
                "images": paths,
                "prompt": prompt,
                "policy": policy.value,
                "preset": preset.value,
                "pictures": drawn,
                **report.to_dict(),
            }
        )
        return
    _print(report)
    for path in pictures:
        print(path)


def _draw(
    out: Path, images: list[Image.Image], vlm: VisionLanguageModel, inputs: Any, variant: Variant
) -> tuple[CompressionReport | None, list[Path]]:
    """What compression would do, None where nothing; pictures of the prompt, and of the budgets
    alone where the image's grid cannot be told."""
    import torch

    from vlcache_triton.apps.evaluation import Query, Recording
    from vlcache_triton.apps.pictures import UnknownGridError, draw_report, image_grids
    from vlcache_triton.integrations.transformers import vl_cache

    from .vlm import refusals

    with waiting("reading the prompt"), refusals():
        with vl_cache(vlm.model, VLCacheConfig(budget=1.0), cuda_graph=False):
            query = Query(dict(inputs), torch.empty(0, dtype=torch.int64))
            recording = Recording(vlm.model, query, 1)
        if not recording.prompt.is_compressible:
            return None, []
        plan, (_, stats) = recording.plan_for(variant), recording.measure(variant)
        report = recording.report(variant, plan)
    try:
        grids = image_grids(vlm.model, vlm.processor, inputs)
    except UnknownGridError as error:
        print(f"no pictures of the image: {error}", file=sys.stderr)
        grids = []
    scores = torch.stack([x.post_vision.scores for x in stats])
    with waiting("drawing"), files("out", "write to", out):
        return report, draw_report(out, images, grids, plan, scores, report.layers)


def _print(report: CompressionReport) -> None:
    (length,) = report.lengths
    table = Table(
        *(right("layer"), right("sparsity γ'"), "", right("kept"), right("of prompt"), ""),
        title=f"{length} prompt tokens, budget {report.budget:g}: KV cache"
        f" {size(report.bytes_before)} → {size(report.bytes_after)}",
    )
    for layer, (sparsity,), (kept,) in zip(
        report.layers, report.sparsity, report.kept, strict=True
    ):
        assert sparsity is not None, "a report of one sequence is one of a compressed sequence"
        share = kept / length
        table.add_row(
            str(layer), f"{sparsity:.3f}", bar(sparsity), str(kept), f"{share:.1%}", bar(share)
        )
    Console().print(table)
