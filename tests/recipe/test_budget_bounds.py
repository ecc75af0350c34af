"""What the first layers can be given at most: never too little, and only shrinking."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_triton import VLCacheConfig, layer_budgets
from vlcache_triton.recipe.budgets import budget_bounds


@st.composite
def problems(draw):
    num_layers, num_seqs = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    power = draw(st.sampled_from([0, 1, 4, 12, 40]))
    density = torch.rand(num_layers, num_seqs, generator=generator, dtype=torch.float64) ** power
    if draw(st.booleans()):  # many equal ones: shares that are integers but for rounding
        density = (density * 4).ceil() / 4
    lengths = torch.randint(1, 3000, (num_seqs,), generator=generator)
    config = VLCacheConfig(
        budget=draw(
            st.one_of(
                st.floats(0.02, 0.9),
                st.integers(2, 3000),
                st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]),
            )
        ),
        min_layer_budget=draw(st.sampled_from([0.0, 0.01, 0.1, 0.3])),
        max_layer_budget=draw(st.sampled_from([0.3, 0.7, 1.0])),
        allocation=draw(st.sampled_from(["sparsity", "sparsity", "uniform", "pyramid"])),
        clipping=draw(st.sampled_from(["exact", "exact", "paper"])),
    )
    return density, lengths, config


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems())
def test_bounds_hold_for_any_continuation_and_only_shrink(problem):
    density, lengths, config = problem
    num_layers = len(density)
    final = layer_budgets(density, lengths, config)
    previous = None
    for num_seen in range(1, num_layers + 1):
        bounds = budget_bounds(density[:num_seen], lengths, num_layers, config)
        assert bounds.shape == (num_seen, len(lengths)) and bounds.dtype == torch.int64
        assert (bounds >= final[:num_seen]).all()
        assert (bounds <= lengths).all()
        if previous is not None:
            assert (bounds[:-1] <= previous).all()
        previous = bounds


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(), st.integers(0, 2**31))
def test_bounds_hold_whatever_comes_after(problem, seed):
    """The same first layers, then others: all of them sparse, dense, or anything."""
    density, lengths, config = problem
    num_layers = len(density)
    num_seen = 1 + seed % num_layers
    bounds = budget_bounds(density[:num_seen], lengths, num_layers, config)
    rest = density[num_seen:]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rest.shape, generator=generator, dtype=torch.float64)
    for others in (torch.zeros_like(rest), torch.ones_like(rest), drawn):
        final = layer_budgets(torch.cat([density[:num_seen], others]), lengths, config)
        assert (bounds >= final[:num_seen]).all()


@pytest.mark.parametrize("clipping", ["exact", "paper"])
@pytest.mark.parametrize("allocation", ["sparsity", "uniform", "pyramid"])
def test_with_all_layers_seen_the_bound_is_tight(allocation, clipping):
    density = torch.rand(24, 2, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([1000, 333])
    config = VLCacheConfig(budget=0.1, allocation=allocation, clipping=clipping)
    bounds = budget_bounds(density, lengths, 24, config)
    assert (bounds - layer_budgets(density, lengths, config)).max() <= 2


def test_bounds_do_shrink():
    """Otherwise nothing would be pruned early."""
    density = torch.ones(32, 1)
    lengths, config = torch.tensor([1000]), VLCacheConfig(budget=0.1)
    first = [int(budget_bounds(density[:n], lengths, 32, config)[0]) for n in (1, 4, 16, 32)]
    # 3200 tokens in all, of which each layer to come takes 10 at least.
    assert first == [1000, 732, 192, 102]


@pytest.mark.parametrize(
    ("density", "lengths", "name"),
    [
        (torch.ones(3), torch.tensor([5]), "density"),
        (torch.ones(3, 2), torch.tensor([5]), "lengths"),
    ],
)
def test_shapes_that_do_not_fit_are_named(density, lengths, name):
    with pytest.raises(ValueError, match=f"^{name}: got shape"):
        budget_bounds(density, lengths, 4, VLCacheConfig())
