"""Draw a prompt's page with the kept tokens lit, its score map, and the layers' budgets."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vlcache_triton.plan import CompressionPlan

from .grids import ImageGrid

COLUMNS = 4  # of a page of small pictures
KEPT = "bright: kept by every KV head{of}; dark: evicted by every one"


def draw_report(
    folder: Path,
    images: Sequence[Image.Image],
    grids: Sequence[ImageGrid],
    plan: CompressionPlan,
    scores: Tensor,
    layers: Sequence[int],
) -> list[Path]:
    """Write PNG pictures of one compressed prompt into `folder`, which is made.

    budgets.png: sparsity and kept share of each layer. For each image i: kept-i.png, the share of
    (layer, KV head) pairs that keep each token; layers-i.png, the same for each layer on its own;
    scores-i.png, where the score ψ falls, mean over layers and heads.

    Args:
        images: as the user gave them; drawn on where a grid has no pixels of its own.
        grids: of the images, in order.
        plan: of one sequence.
        scores: `[num_layers, num_kv_heads, length]`.
        layers: the model's indices of the compressed layers, for titles.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = kept_share(plan)  # [num_layers, length]
    paths = [_draw_budgets(folder / "budgets.png", plan, layers)]
    normalised = scores / scores.sum(-1, keepdim=True).clamp(min=1e-12)
    ranking = normalised.mean((0, 1)).cpu()  # [length]
    for i, grid in enumerate(grids, 1):
        fallback = images[min(i, len(images)) - 1]
        page = grid.pixels if grid.pixels is not None else _pixels(fallback)
        lit = kept[:, grid.positions]  # [num_layers, rows, columns]
        share = f"{lit.mean():.0%} of this image's tokens kept"
        caption = KEPT.format(of=" of every layer")
        path = folder / f"kept-{i}.png"
        paths.append(_draw_maps(path, page, lit.mean(0)[None], [share], caption))
        titles = [f"layer {n}: {x.mean():.0%}" for n, x in zip(layers, lit, strict=True)]
        path = folder / f"layers-{i}.png"
        paths.append(_draw_maps(path, page, lit, titles, KEPT.format(of="")))
        heat = ranking[grid.positions]
        heat = heat / heat.max().clamp(min=1e-12)
        title, caption = "score, mean over layers and heads", "bright: the highest; dark: none"
        path = folder / f"scores-{i}.png"
        paths.append(_draw_maps(path, page, heat[None], [title], caption))
    return paths


def kept_share(plan: CompressionPlan) -> Tensor:
    """`[num_layers, length]` fp32 in [0, 1]: the share of KV heads that keep each token.

    Raises:
        ValueError: for a plan of several sequences.
    """
    if len(plan.prompt.lengths) != 1:
        raise ValueError(f"plan: got {len(plan.prompt.lengths)} sequences, expected one")
    num_layers = plan.head_keep.shape[0]
    share = torch.zeros(num_layers, plan.prompt.lengths[0])
    for layer in range(num_layers):
        positions = plan.kept_positions(layer, 0).flatten().cpu().long()
        positions = positions[positions >= 0]  # -1 fills the rows of heads that keep fewer
        share[layer] = torch.bincount(positions, minlength=share.shape[1]) / plan.num_kv_heads
    return share


def light(page: Tensor, weights: Tensor) -> Tensor:
    """The page `[height, width, 3]`, dimmed where weights `[rows, columns]` in [0, 1] are low."""
    size = page.shape[:2]
    mask = F.interpolate(weights[None, None], size=size, mode="nearest")[0, 0][..., None]
    warm = torch.tensor([1.0, 0.93, 0.55])  # lit paper; what is evicted goes dark blue
    cold = torch.tensor([0.10, 0.12, 0.22])
    return page * (cold + mask * (warm - cold))


def _draw_maps(path: Path, page: Tensor, maps: Tensor, titles: Sequence[str], caption: str) -> Path:
    columns = min(COLUMNS, len(maps))
    rows = ceil(len(maps) / columns)
    side = 6.0 if len(maps) == 1 else 3.2
    aspect = page.shape[0] / page.shape[1]
    figure = Figure(figsize=(side * columns, (side * aspect + 0.4) * rows), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, weights, title in zip(axes.flat, maps, titles, strict=False):
        axis.imshow(light(page, weights).numpy())
        axis.set_title(title, fontsize=10)
    figure.supxlabel(caption, fontsize=9)
    figure.savefig(path, dpi=110)
    return path


def _draw_budgets(path: Path, plan: CompressionPlan, layers: Sequence[int]) -> Path:
    figure = Figure(figsize=(max(5.0, 0.28 * len(layers) + 2), 4.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    names = [str(layer) for layer in layers]
    top.bar(names, plan.sparsity[:, 0].tolist(), color="#5b6f9e")
    top.set_ylabel("sparsity γ'")
    top.set_ylim(0, 1)
    kept = plan.keep[:, 0] / plan.prompt.lengths[0]
    bottom.bar(names, kept.tolist(), color="#d9a521")
    mean = float(kept.mean())
    bottom.axhline(mean, color="black", linewidth=0.8, linestyle="--", label=f"mean {mean:.0%}")
    bottom.legend(fontsize=8)
    bottom.set_ylabel("kept share")
    bottom.set_xlabel("layer")
    figure.savefig(path, dpi=110)
    return path


def _pixels(image: Image.Image) -> Tensor:
    data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).float() / 255
