"""Budgets of heads and layers that a file says of a model: what their loss grows by, or their hits.

`vlcache calibrate` writes the first kind: of each KV head, what the answers lose as that head alone
keeps little. A budget is then given out by marginal loss, the most first, on the lower convex hull
of each curve; this is the best that curves which add up allow. The second kind is SparseMM's
(https://github.com/CR400AF-A/SparseMM): of each query head, how often it looks where the answer is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .budgets import share_out

FORMAT = "vlcache head profile 1"
NEGLIGIBLE = 0.01  # nats: a loss below is as good as none, and next to chance on few prompts


@dataclass(frozen=True)
class HeadProfile:
    """How much the answers of a model lose as one KV head alone keeps little.

    model: which, as its caches have it (`VLCache.made_for`).
    made: the date, as ISO 8601 writes it.
    data: what was asked, in words.
    ranked_by: policy and choices by which the tokens were ranked, in words.
    num_prompts: that were asked about.
    levels: shares of the prompt that a head kept, ascending, below 1.
    losses: `[num_layers][num_kv_heads][levels]`, of a token of the answer in nats, beyond that of
        the full cache; the mean over prompts.
    """

    model: str
    made: str
    data: str
    ranked_by: str
    num_prompts: int
    levels: list[float]
    losses: list[list[list[float]]]

    def heads(self, total: int, length: int, num_kv_heads: int) -> Tensor:
        """Tokens for each head, int64 `[num_layers, num_kv_heads]` on the host, `total` in all."""
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return allocate(losses.flatten(0, 1), self.levels, total, length).view(losses.shape[:2])

    def layers(self, total: int, length: int) -> Tensor:
        """Tokens for a head of each layer, int64 `[num_layers]` on the host, `total` in all, where
        the heads of a layer are to keep equal numbers."""
        losses = torch.tensor(self.losses, dtype=torch.float64).sum(1)
        return allocate(losses, self.levels, total, length)

    def shares(self, budget: float) -> list[list[float]]:
        """Of the prompt, for each head: `[num_layers][num_kv_heads]`, whose mean is the budget."""
        num_kv_heads = len(self.losses[0])
        total = round(budget * 1000) * len(self.losses) * num_kv_heads
        return (self.heads(total, 1000, num_kv_heads) / 1000).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, with the shares that it gives at some budgets, for who reads it."""
        shares = {f"{budget:g}": self.shares(budget) for budget in (0.05, 0.1, 0.2)}
        return {"format": FORMAT, **asdict(self), "shares": shares}

    def write(self, path: Path) -> None:
        """As JSON, for read_profile."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class HeadHits:
    """SparseMM's: how often each query head looks at the image where the answer is.

    hits: `[num_layers][num_heads]`, at least 0, not all 0.
    ratio: of an even share that each head has for certain.
    window: last tokens that each head has besides, out of the budget.
    """

    hits: list[list[float]]
    ratio: float = 0.1
    window: int = 32

    def heads(self, total: int, length: int, num_kv_heads: int) -> Tensor:
        """As `HeadProfile.heads`."""
        weights = self._weights(num_kv_heads)
        return self._share(weights.flatten(), total, length).view_as(weights)

    def layers(self, total: int, length: int) -> Tensor:
        """As `HeadProfile.layers`."""
        return self._share(self._weights(1).flatten(), total, length)

    def _share(self, weights: Tensor, total: int, length: int) -> Tensor:
        even = total // len(weights)
        certain = even
        if even > self.window:
            certain = self.window + int(self.ratio * (even - self.window))
        rest = total - certain * len(weights)
        return certain + share_out(weights, rest, 0, length - certain)

    def _weights(self, num_kv_heads: int) -> Tensor:
        hits = torch.tensor(self.hits, dtype=torch.float64)
        return hits.view(len(hits), num_kv_heads, -1).sum(-1)


def read_profile(path: Path | str) -> HeadProfile | HeadHits:
    """A file of `vlcache calibrate`, or SparseMM's `{"layer-head": [hits, ...], ...}`.

    Raises:
        ValueError: for a file that is neither, naming what is wrong with it.
        OSError: where it cannot be read.
    """
    path = Path(path)
    try:
        page = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"profile: {path.name!r} holds no JSON: {error}") from error
    if isinstance(page, dict) and page.get("format") == FORMAT:
        names = HeadProfile.__dataclass_fields__
        missing = sorted(names.keys() - page.keys())
        if missing:
            raise ValueError(f"profile: {path.name!r} has no {missing}")
        profile = HeadProfile(**{name: page[name] for name in names})
        shape = _shape(profile.losses)
        if len(shape) != 3 or shape[2] != len(profile.levels) or not _are_levels(profile.levels):
            raise ValueError(
                f"profile: {path.name!r} has losses of shape {shape} at levels {profile.levels},"
                " expected [num_layers][num_kv_heads][levels] at ascending shares below 1"
            )
        return profile
    return _read_hits(path, page)


def check_fits(profile: HeadProfile | HeadHits, num_layers: int, num_kv_heads: int) -> None:
    """Refuse a profile of another number of layers or heads.

    Raises:
        ValueError: naming both.
    """
    if isinstance(profile, HeadProfile):
        shape = len(profile.losses), len(profile.losses[0])
        fits = shape == (num_layers, num_kv_heads)
    else:
        shape = len(profile.hits), len(profile.hits[0])
        fits = shape[0] == num_layers and shape[1] % num_kv_heads == 0
    if not fits:
        raise ValueError(
            f"profile: got one of {shape[0]} layers and {shape[1]} heads, expected one of the"
            f" model's {num_layers} layers and {num_kv_heads} KV heads"
        )


def allocate(losses: Tensor, levels: list[float], total: int, length: int) -> Tensor:
    """Tokens of each curve: as if given one by one to whose loss falls most by it, until what is
    left to lose is NEGLIGIBLE; the others evenly, to who has least first.

    Args:
        losses: `[n, levels]`, beyond that with all tokens.
        levels: shares of `length`, ascending, below 1; at 1 the loss is 0 by definition.
        total: tokens in all.
        length: of the prompt.

    Returns:
        int64 `[n]` on the host, of `total` in all, from 0 to length. All but one are at a corner of
        their curve's hull while tokens still lower any loss.
    """
    corners = [max(round(level * length), 1) for level in levels] + [length]
    # Fewer tokens never lose less: what says so is chance. And nothing is lost with all.
    curves = torch.cat([losses.double().cpu(), losses.new_zeros(len(losses), 1).double().cpu()], 1)
    curves = curves.flip(1).cummax(1).values.flip(1)
    curves = torch.where(curves < NEGLIGIBLE, 0.0, curves)
    least = min(corners[0], total // max(len(losses), 1), length)
    keep = torch.full((len(losses),), least, dtype=torch.int64)
    left = total - int(keep.sum())
    steps = [
        (gain / size, i, size)
        for i, curve in enumerate(curves.tolist())
        for gain, size in _steps(curve, corners)
        if gain > 0
    ]
    if least == corners[0]:
        for _, i, size in sorted(steps, key=lambda step: -step[0]):  # a curve's own are in order
            taken = min(size, left)
            keep[i] += taken
            left -= taken
    return share_out(torch.ones(len(losses)), total, keep, length)


def _steps(curve: list[float], corners: list[int]) -> list[tuple[float, int]]:
    """(loss saved, tokens) from corner to corner of the curve's lower convex hull."""
    hull: list[tuple[int, float]] = []
    for x, y in zip(corners, curve, strict=True):
        if hull and x <= hull[-1][0]:
            continue  # levels of a short prompt, that are the same number of tokens
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return [(a[1] - b[1], b[0] - a[0]) for a, b in pairwise(hull)]


def _is_above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _read_hits(path: Path, page: Any) -> HeadHits:
    expected = 'a file of `vlcache calibrate` or SparseMM\'s {"layer-head": [hits, ...], ...}'
    error = ValueError(f"profile: {path.name!r} is none, expected {expected}")
    if not isinstance(page, dict) or not page:
        raise error
    means: dict[tuple[int, int], float] = {}
    for key, hits in page.items():
        layer, _, head = str(key).partition("-")
        if not (layer.isdecimal() and head.isdecimal()) or len(_shape(hits)) != 1 or not hits:
            raise error
        means[int(layer), int(head)] = sum(hits) / len(hits)
    num_layers, num_heads = (1 + max(place[i] for place in means) for i in (0, 1))
    if len(means) != num_layers * num_heads or min(means.values()) < 0 or not any(means.values()):
        raise ValueError(
            f"profile: {path.name!r} has {len(means)} heads from {min(means.values())} hits on,"
            f" expected {num_layers} layers of {num_heads}, of 0 hits or more, not all 0"
        )
    return HeadHits([[means[i, j] for j in range(num_heads)] for i in range(num_layers)])


def _shape(values: Any) -> tuple[int, ...]:
    """Of nested lists of numbers; () where they are none, or ragged."""
    try:
        return tuple(torch.tensor(values, dtype=torch.float64).shape)
    except (TypeError, ValueError, RuntimeError):
        return ()


def _are_levels(levels: Any) -> bool:
    return bool(levels) and levels == sorted(set(levels)) and levels[0] > 0 and levels[-1] < 1
