from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_triton import VLCacheConfig, layer_budgets


@st.composite
def problems(draw):
    layers = draw(st.integers(1, 48))
    seqs = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**31))
    power = draw(st.sampled_from([0, 1, 4, 12]))
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(layers, seqs, generator=generator, dtype=torch.float64) ** power
    lengths = torch.randint(1, 3000, (seqs,), generator=generator)
    budget = draw(st.sampled_from([0.01, 0.05, 0.1, 0.33, 0.5, 0.9, 1.0, 2, 7, 400]))
    low = draw(st.sampled_from([0.0, 0.01, 0.1]))
    high = draw(st.sampled_from([0.3, 1.0]))
    allocation = draw(st.sampled_from(["sparsity", "uniform", "pyramid"]))
    return (
        density,
        lengths,
        VLCacheConfig(
            budget=budget, min_layer_budget=low, max_layer_budget=high, allocation=allocation
        ),
    )


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_total_is_exact_and_the_bounds_hold(problem):
    density, lengths, config = problem
    keep = layer_budgets(density, lengths, config)
    num_layers = len(density)
    for b, m in enumerate(lengths.tolist()):
        low = max((torch.tensor(config.min_layer_budget * m, dtype=torch.float64)).ceil().item(), 1)
        high = max((torch.tensor(config.max_layer_budget * m).double()).floor().item(), low)
        if isinstance(config.budget, int):
            total = min(config.budget, m) * num_layers
        else:
            total = round(config.budget * num_layers * m)
        total = min(max(total, low * num_layers), high * num_layers)
        assert keep[:, b].sum().item() == pytest.approx(total, abs=0)
        assert keep[:, b].min() >= low and keep[:, b].max() <= high


def test_shares_are_proportional_to_density_where_nothing_clips():
    density = torch.tensor([[0.1], [0.3], [0.6]])
    config = VLCacheConfig(budget=0.1)
    keep = layer_budgets(density, torch.tensor([1000]), config)
    assert keep.flatten().tolist() == [30, 90, 180]


def test_what_clipping_takes_is_poured_over_the_others():
    density = torch.tensor([[0.9], [0.05], [0.05]])
    keep = layer_budgets(density, torch.tensor([100]), VLCacheConfig(budget=0.5))
    assert keep.flatten().tolist() == [100, 25, 25]


@settings(max_examples=200, deadline=None)
@given(problems())
def test_literal_clipping_is_algorithm_1_as_it_is_written(problem):
    density, lengths, config = problem
    config = replace(config, allocation="sparsity", clipping="paper")
    keep = layer_budgets(density, lengths, config)
    num_layers = len(density)
    for b, m in enumerate(lengths.tolist()):
        alpha = min(config.budget / m, 1) if isinstance(config.budget, int) else config.budget
        total = density[:, b].clamp(min=1e-12).sum().item()
        for layer in range(num_layers):
            share = max(density[layer, b].item(), 1e-12) / total * alpha * num_layers
            beta = min(max(share, config.min_layer_budget), config.max_layer_budget)
            expected = min(max(beta * m, 1), m)
            assert abs(keep[layer, b].item() - expected) < 1 + 1e-6  # bounds are whole tokens


def test_literal_clipping_loses_or_adds_tokens_where_a_layer_is_clipped():
    """A layer at its maximum leaves what it cannot take; one at its minimum takes more."""
    density = torch.tensor([[0.9], [0.05], [0.05]])
    literal = VLCacheConfig(budget=0.5, clipping="paper")
    assert layer_budgets(density, torch.tensor([100]), literal).flatten().tolist() == [100, 8, 8]
    density = torch.tensor([[1.0], [1.0], [0.001]])
    literal = VLCacheConfig(budget=0.1, clipping="paper")
    assert layer_budgets(density, torch.tensor([100]), literal).flatten().tolist() == [15, 15, 1]
    assert VLCacheConfig().clipping == "exact"


def test_ties_go_to_the_lower_layer():
    keep = layer_budgets(torch.ones(4, 1), torch.tensor([5]), VLCacheConfig(budget=0.5))
    assert keep.flatten().tolist() == [3, 3, 2, 2]


def test_a_batch_equals_its_sequences():
    density = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([17, 900, 64])
    config = VLCacheConfig(budget=0.2)
    together = layer_budgets(density, lengths, config)
    for b in range(3):
        alone = layer_budgets(density[:, b : b + 1], lengths[b : b + 1], config)
        assert torch.equal(together[:, b : b + 1], alone)
