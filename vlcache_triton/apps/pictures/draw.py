"""Draw a prompt's page with the kept tokens tinted, its score map, and the layers' budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vlcache_triton.recipe.plan import CompressionPlan

from .grids import ImageGrid

COLUMNS = 4  # of a page of small pictures
LUMINANCE = torch.tensor([0.2126, 0.7152, 0.0722])
TINT = torch.tensor([1.0, 0.5, 0.0])
OPACITY = 0.5  # of the full tint: black and white then keep a contrast of 4.5 under any weight
MAX_SIDE = 1024  # pixels of a page that is drawn on; a photograph has more than can be seen
DPI = 144
SCALE_SIZE = (4.5, 0.3)  # inches, under the maps


def draw_report(
    folder: Path,
    images: Sequence[Image.Image],
    grids: Sequence[ImageGrid],
    plan: CompressionPlan,
    scores: Tensor,
    layers: Sequence[int],
) -> list[Path]:
    """Write PNG pictures of one compressed prompt into `folder`, which is made.

    budgets.png: sparsity and kept share of each layer. For each image i: kept-i.png, how many of
    the (layer, KV head) pairs keep each token; layers-i.png, the same for each layer on its own;
    scores-i.png, where the score ψ falls, mean over layers and heads. A scale under each says what
    its colours mean.

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
    heads, total = plan.num_kv_heads, len(layers) * plan.num_kv_heads
    of_all = _count_scale(total, f"of all {total} ({len(layers)} layers × {heads})")
    of_layer = _count_scale(heads, f"of the layer's {heads}")
    quarters = {x / 4: f"{x / 4:.0%}" for x in range(5)}
    of_score = Scale("share of the highest score on this image", quarters)
    for i, grid in enumerate(grids, 1):
        fallback = images[min(i, len(images)) - 1]
        page = grid.pixels if grid.pixels is not None else _pixels(fallback)
        held = kept[:, grid.positions]  # [num_layers, rows, columns]
        heat = ranking[grid.positions]
        heat = heat / heat.max().clamp(min=1e-12)
        share = f"{held.mean():.0%} of this image's tokens kept"
        by_layer = [f"layer {n}: {x.mean():.0%}" for n, x in zip(layers, held, strict=True)]
        for name, maps, titles, scale in (
            ("kept", held.mean(0)[None], [share], of_all),
            ("layers", held, by_layer, of_layer),
            ("scores", heat[None], ["score ψ, mean over layers and heads"], of_score),
        ):
            paths.append(_draw_maps(folder / f"{name}-{i}.png", page, maps, titles, scale))
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


def blend(page: Tensor, weights: Tensor) -> Tensor:
    """The page `[height, width, 3]` in grey, blended towards `TINT` by weights `[rows, columns]`
    in [0, 1].

    A pixel's chroma (its largest channel less its smallest) is `OPACITY` times its weight, on any
    page: what is not kept has no colour, white paper as little as black.
    """
    mask = F.interpolate(weights[None, None], size=page.shape[:2], mode="nearest")[0, 0]
    mask = OPACITY * mask[..., None]
    return (page @ LUMINANCE)[..., None] * (1 - mask) + TINT * mask


@dataclass(frozen=True)
class Scale:
    """What the tint means. ticks: weight -> text."""

    label: str
    ticks: dict[float, str]


def _count_scale(num_heads: int, of_which: str) -> Scale:
    counts = sorted({round(num_heads * quarter / 4) for quarter in range(5)})
    ticks = {count / num_heads: str(count) for count in counts}
    return Scale(f"KV heads that keep the token, {of_which}", ticks)


def _draw_maps(path: Path, page: Tensor, maps: Tensor, titles: Sequence[str], scale: Scale) -> Path:
    """The page under each of the maps `[n, rows, columns]`, and the scale they share."""
    columns = min(COLUMNS, len(maps))
    rows = ceil(len(maps) / columns)
    side = 6.0 if len(maps) == 1 else 4.2
    height = side * page.shape[0] / page.shape[1] + 0.4
    below = SCALE_SIZE[1] + 0.5
    figure = Figure(figsize=(side * columns, height * rows + below), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[height] * rows + [SCALE_SIZE[1]])
    for n, (weights, title) in enumerate(zip(maps, titles, strict=True)):
        axes = figure.add_subplot(grid[n // columns, n % columns])
        axes.imshow(blend(page, weights).numpy())
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("0.75")  # white pages end somewhere
    _draw_scale(figure.add_subplot(grid[rows, :]), scale)
    figure.savefig(path, dpi=DPI)
    return path


def _draw_scale(axes: Any, scale: Scale) -> None:
    """The tint from none to full, as it looks on white and on black."""
    paper = torch.tensor([1.0, 0.0])[:, None, None].expand(2, 256, 3)
    tints = blend(paper, torch.linspace(0, 1, 256).expand(2, 256))
    axes.imshow(tints.numpy(), extent=(0, 1, 0, 2), aspect="auto", interpolation="nearest")
    axes.set_box_aspect(SCALE_SIZE[1] / SCALE_SIZE[0])
    axes.set_xticks(list(scale.ticks), list(scale.ticks.values()), fontsize=9)
    axes.set_yticks([0.5, 1.5], ["on black", "on white"], fontsize=7)
    axes.set_xlabel(scale.label, fontsize=9)


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
    """`[height, width, 3]` fp32 in [0, 1], no side longer than `MAX_SIDE`."""
    shown = image.convert("RGB")
    shown.thumbnail((MAX_SIDE, MAX_SIDE))
    data = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8)
    return data.view(shown.height, shown.width, 3).float() / 255
