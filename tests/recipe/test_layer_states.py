"""Memory for the states of layers: filled and lent at addresses that stay, and rearranged."""

from __future__ import annotations

import pytest
import torch

from vlcache_triton.ops import get_backend
from vlcache_triton.pool.allocator import PoolAllocator
from vlcache_triton.pool.shape import PoolShape, kind_of
from vlcache_triton.pool.states import LayerStates, state_shapes


def draw(num_seqs=2, seed=0):
    """A convolution's and a recurrent state, of different types."""
    generator = torch.Generator().manual_seed(seed)
    conv = torch.randn(num_seqs, 6, 4, generator=generator).bfloat16()
    return [conv, torch.randn(num_seqs, 3, 5, 5, generator=generator)]


def assert_same(tensors, expected):
    for tensor, other in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype


def test_filling_copies_into_place():
    tensors = draw()
    states = LayerStates(state_shapes(tensors))
    places = [x.data_ptr() for x in states.tensors]
    for seed in range(3):
        tensors = draw(seed=seed)
        states.fill(tensors)
        assert_same(states.tensors, draw(seed=seed))
        assert [x.data_ptr() for x in states.tensors] == places
    tensors[1].zero_()
    assert_same(states.tensors, draw(seed=2))


@pytest.mark.parametrize("indices", [[1, 0], [0, 0], [1], [0, 1, 1, 0]])
def test_sequences_can_be_chosen(indices):
    states = LayerStates(state_shapes(draw()))
    states.fill(draw())
    states.select_sequences(torch.tensor(indices))
    assert_same(states.tensors, [x[indices] for x in draw()])
    assert states.shape == state_shapes(draw(num_seqs=len(indices)))


def test_a_shape_tells_sizes_and_types_apart():
    shape = state_shapes(draw())
    assert LayerStates(shape).shape == shape == state_shapes(draw(seed=1))
    assert state_shapes(draw(num_seqs=3)) != shape
    assert state_shapes([x.half() for x in draw()]) != shape
    assert shape[:1] != shape


def test_memory_is_lent_again_where_it_fits():
    """It goes with a pool, of which it is a part."""
    allocator, backend = PoolAllocator(), get_backend("reference", torch.device("cpu"))
    kv, sizes = torch.zeros(1, 8), dict(num_layers=1, num_seqs=2, num_kv_heads=1)
    pool = PoolShape(**kind_of(kv, kv), **sizes, capacity=64, max_seqlen_k=64)

    class Owner:
        pass

    lent = []
    for num_seqs in (2, 2, 3):
        owner = Owner()
        allocator.allocate(pool, backend, owner)
        lent.append(allocator.attach(LayerStates, state_shapes(draw(num_seqs)), owner))
        del owner
    assert lent[0] is lent[1] and lent[2] is not lent[1]
