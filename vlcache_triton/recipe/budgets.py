"""Share a prompt's cache budget out over its layers, exactly (recipe step 3, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import VLCacheConfig

# PyramidKV's β: the first layer gets about 2β - 1 over β of the mean, the last 1 over β of it.
PYRAMID_STEEPNESS = 20.0


def layer_budgets(density: Tensor, lengths: Tensor, config: VLCacheConfig) -> Tensor:
    """The number of tokens that each layer keeps of each sequence.

    β[l] = clip(d[l] / Σd * α * L, min, max) (Algorithm 1), where what clipping takes or leaves is
    poured over the unclipped layers until Σβ = αL holds again; then integers by largest
    remainder, ties to the lower layer. The total of a sequence of m tokens is exactly
    round(α L m) (L * tokens for an absolute budget), clamped to what the bounds allow, and to
    `max_cache_tokens` a layer.

    With `clipping="paper"` β[l] is as written above and no more: each layer's tokens are rounded
    half up, and the total is what they add up to.

    Args:
        density: `[num_layers, num_seqs]`, d = 1 - γ', the retained share of the visible
            post-vision attention entries; any float dtype, values in [0, 1].
        lengths: `[num_seqs]` int, prompt lengths without padding.
        config: the budget, its bounds and the allocation rule.

    Returns:
        int64 `[num_layers, num_seqs]` on the device of `density`; at least one token a layer for
        a sequence that has any. Cost: O(L² B) arithmetic, on the host or device alike, no sync.
    """
    num_layers = _check(density, lengths)
    lower, upper = _bounds(density, lengths, config)
    weights, target = _weights(density, config), _target(num_layers, lengths, config)
    if config.clipping == "paper":
        return (_clip(weights, target, lower, upper) + 0.5).floor().long()
    total = _reachable(target, num_layers, lower, upper)
    return _largest_remainder(_share_within_bounds(weights, total, lower, upper), total, upper)


def shrink(rows: Tensor, total: Tensor, least: int) -> Tensor:
    """Fewer of these rows, in proportion and exactly `total` in all; ties to the lower index.

    Args:
        rows: `[n, num_columns]` int.
        total: `[num_columns]` int, at most the sum of each column's rows.
        least: what each entry keeps, if it has as many.

    Returns:
        int64 `[n, num_columns]`.
    """
    upper = rows.double()
    lower, total = upper.clamp(max=least), total.double()
    return _largest_remainder(
        _share_within_bounds(upper.clamp(min=1e-12), total, lower, upper), total, upper
    )


def budget_bounds(
    density: Tensor, lengths: Tensor, num_layers: int, config: VLCacheConfig
) -> Tensor:
    """What the first layers can be given at most, before the density of the others is known.

    The layers to come take at least their minimum (with literal clipping: only make the sum of the
    densities greater), so the share of those seen only shrinks as more are seen: what a layer's
    bound evicts, its final budget evicts too.

    Args:
        density: `[num_seen, num_seqs]`, of the first layers.
        lengths, config: as for layer_budgets.
        num_layers: of the whole model.

    Returns:
        int64 `[num_seen, num_seqs]`, never less than layer_budgets will give.
    """
    num_seen = _check(density, lengths)
    if config.allocation != "sparsity":  # known without any density
        ones = torch.ones(num_layers, density.shape[1], dtype=torch.float64, device=density.device)
        return layer_budgets(ones, lengths, config)[:num_seen]
    lower, upper = _bounds(density, lengths, config)
    weights, target = _weights(density, config), _target(num_layers, lengths, config)
    if config.clipping == "paper":
        shares = _clip(weights, target, lower, upper) + 1e-9  # sums may differ by rounding
    else:
        total = _reachable(target, num_layers, lower, upper) - lower * (num_layers - num_seen)
        shares = _share_within_bounds(weights, total.minimum(upper * num_seen), lower, upper)
    # Rounding gives a layer at most two tokens more than its share.
    return (shares.floor() + 2).minimum(upper).long()


def share_out(weights: Tensor, total: int, least: int | Tensor, most: int) -> Tensor:
    """Whole numbers in proportion to `weights`, as far as their bounds allow.

    What the bounds take or leave is poured over the others; then largest remainder.

    Args:
        weights: `[n]` of any float dtype, at least 0.
        total: what all sum to, clamped to what the bounds allow.
        least, most: whole bounds of each; least may be `[n]`.

    Returns:
        int64 `[n]` on the device of `weights`.
    """
    weights = weights.double().clamp(min=1e-12)[:, None]
    lower = torch.ones_like(weights) * torch.as_tensor(least).to(weights).view(-1, 1)
    upper = torch.full_like(weights, most)
    sum_of_all = weights.new_tensor([total]).clamp(lower.sum(0), upper.sum(0))
    shares = _share_within_bounds(weights, sum_of_all, lower, upper)
    return _largest_remainder(shares, sum_of_all, upper)[:, 0]


def _check(density: Tensor, lengths: Tensor) -> int:
    if density.ndim != 2:
        raise ValueError(
            f"density: got shape {tuple(density.shape)}, expected [num_layers, num_seqs]"
        )
    if lengths.shape != (density.shape[1],):
        raise ValueError(
            f"lengths: got shape {tuple(lengths.shape)}, expected ({density.shape[1]},)"
        )
    return density.shape[0]


def _bounds(density: Tensor, lengths: Tensor, config: VLCacheConfig) -> tuple[Tensor, Tensor]:
    """(lower, upper) bounds of a layer's budget, `[num_seqs]` fp64 integers."""
    length = lengths.to(density.device, torch.float64)
    lower = torch.maximum((config.min_layer_budget * length).ceil(), length.clamp(max=1.0))
    if config.max_cache_tokens is not None:
        lower = lower.clamp(max=config.max_cache_tokens)
    return lower, torch.maximum((config.max_layer_budget * length).floor(), lower)


def _target(num_layers: int, lengths: Tensor, config: VLCacheConfig) -> Tensor:
    """What the budget is for all layers together, αLm, `[num_seqs]` fp64."""
    length = lengths.double()
    if isinstance(config.budget, int):
        target = length.clamp(max=config.budget) * num_layers
    else:
        target = config.budget * num_layers * length
    if config.max_cache_tokens is not None:
        target = target.clamp(max=config.max_cache_tokens * num_layers)
    return target


def _reachable(target: Tensor, num_layers: int, lower: Tensor, upper: Tensor) -> Tensor:
    """The whole number next to `target` that the bounds of a layer allow, `[num_seqs]` fp64."""
    total = target.to(lower.device).round()
    return torch.minimum(torch.maximum(total, lower * num_layers), upper * num_layers)


def _weights(density: Tensor, config: VLCacheConfig) -> Tensor:
    """`[num_layers, num_seqs]` fp64, positive: what the layers' shares are proportional to."""
    num_layers = density.shape[0]
    if config.allocation == "sparsity":
        # A layer of density 0 cannot be: a row's maximum always passes the filter.
        return density.double().clamp(min=1e-12)
    if config.allocation == "uniform":
        return torch.ones_like(density, dtype=torch.float64)
    last = 1.0 / PYRAMID_STEEPNESS
    ramp = torch.linspace(2.0 - last, last, num_layers, dtype=torch.float64, device=density.device)
    return (ramp if num_layers > 1 else torch.ones_like(ramp))[:, None].expand_as(density)


def _clip(weights: Tensor, target: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Shares `clip(weights / Σ weights * target, lower, upper)`, whatever they sum to."""
    return (weights / weights.sum(0) * target.to(weights.device)).clamp(lower, upper)


def _share_within_bounds(weights: Tensor, total: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Shares `clip(λ * weights, lower, upper)` with λ such that they sum to `total`.

    Σ clip(λ w, lower, upper) is piecewise linear and rising in λ, with its kinks at lower / w and
    upper / w: evaluate it at all 2L kinks, and interpolate in the piece that crosses the total.
    """
    kinks = torch.cat([lower / weights, upper / weights]).sort(dim=0).values  # [2L, B]
    sums = (kinks[:, None] * weights).clamp(lower, upper).sum(1)  # [2L, B]
    piece = (sums <= total).sum(0).clamp(1, len(kinks) - 1)[None]  # first kink past the total
    left, right = kinks.gather(0, piece - 1), kinks.gather(0, piece)
    below, above = sums.gather(0, piece - 1), sums.gather(0, piece)
    slope = torch.where(above > below, (total - below) / (above - below), torch.zeros_like(below))
    return (weights * (left + slope * (right - left))).clamp(lower, upper)


def _largest_remainder(shares: Tensor, total: Tensor, upper: Tensor) -> Tensor:
    """Round `[L, B]` shares to integers that sum to `total`; ties to the lower layer."""
    # 1e-9: a share that is an integer but for rounding in λ is that integer.
    whole = (shares + 1e-9).floor()
    remainder = (shares - whole).clamp(min=0.0)
    for _ in range(2):  # twice: where rounding left more than one unit for the eligible layers
        missing = total - whole.sum(0)  # [B]
        key = torch.where(whole < upper, remainder, torch.full_like(remainder, -1.0))
        order = key.sort(dim=0, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)[:, None].expand_as(order)
        )
        whole = whole + ((rank < missing) & (whole < upper)).to(whole.dtype)
    return whole.long()
