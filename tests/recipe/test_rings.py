"""Rings of window layers against attention over everything, with a mask."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_triton.pool.rings import SPARE, WindowRings
from vlcache_triton.pool.shape import RingShape, kind_of
from vlcache_triton.recipe.softmax import Softmax

HEADS, KV_HEADS, D, D_V, LAYERS = 6, 2, 8, 4, 2
PADS = (0, 3)


def random(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Dense:
    """All rows of all layers, and the mask written out."""

    def __init__(self, window, is_chunked):
        self.window, self.is_chunked = window, is_chunked
        self.k = torch.empty(LAYERS, len(PADS), KV_HEADS, 0, D, dtype=torch.float64)
        self.v = torch.empty(LAYERS, len(PADS), KV_HEADS, 0, D_V, dtype=torch.float64)

    def append(self, k, v):
        self.k, self.v = torch.cat([self.k, k], 3), torch.cat([self.v, v], 3)

    def attend(self, layer, q):
        n, num_seen = q.shape[2], self.k.shape[3]
        out = torch.zeros(len(PADS), n, HEADS, D_V, dtype=torch.float64)
        for seq, pad in enumerate(PADS):
            for i in range(n):
                row = num_seen - n + i
                if self.is_chunked:
                    first = pad + (row - pad) // self.window * self.window
                else:
                    first = max(row - self.window + 1, pad)
                for head in range(HEADS):
                    kv_head = head // (HEADS // KV_HEADS)
                    k = self.k[layer, seq, kv_head, first : row + 1]
                    v = self.v[layer, seq, kv_head, first : row + 1]
                    out[seq, i, head] = (0.3 * k @ q[seq, head, i]).softmax(0) @ v
        return out


def ring_shape(k, v, **sizes):
    usual = dict(num_layers=LAYERS, num_seqs=len(k), num_kv_heads=KV_HEADS)
    return RingShape(**kind_of(k, v) | usual | sizes)


def begin(generator, window, is_chunked, prompt_length):
    """Both, after a prompt of which each layer hands over what Transformers keeps."""
    dense = Dense(window, is_chunked)
    k = random(generator, LAYERS, len(PADS), KV_HEADS, prompt_length, D)
    v = random(generator, LAYERS, len(PADS), KV_HEADS, prompt_length, D_V)
    dense.append(k, v)
    rows = [(a[:, :, -window + 1 :], b[:, :, -window + 1 :]) for a, b in zip(k, v, strict=True)]
    rings = WindowRings(ring_shape(*rows[0], window=window, is_chunked=is_chunked))
    rings.fill(rows, PADS, prompt_length)
    return rings, dense


def step(generator, rings, dense, n):
    """A pass of n rows; what it attends to agrees in every layer."""
    rings.advance(dense.k.shape[3], n)
    assert int(rings.seen) == dense.k.shape[3]
    k = random(generator, LAYERS, len(PADS), KV_HEADS, n, D)
    v = random(generator, LAYERS, len(PADS), KV_HEADS, n, D_V)
    dense.append(k, v)
    for layer in range(LAYERS):
        q = random(generator, len(PADS), HEADS, n, D)
        out = rings.attend(q, *rings.append(layer, k[layer], v[layer]), Softmax(0.3))
        torch.testing.assert_close(out, dense.attend(layer, q))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    window=st.integers(2, 12),
    is_chunked=st.booleans(),
    prompt_length=st.integers(4, 40),
    passes=st.lists(st.sampled_from([1, 1, 1, 2, 7, 35]), max_size=12),
    seed=st.integers(0, 2**16),
)
def test_rings_see_what_a_mask_shows(window, is_chunked, prompt_length, passes, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    rings, dense = begin(generator, window, is_chunked, prompt_length)
    for n in passes:
        step(generator, rings, dense, n)


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("window", [5, 16])
def test_a_long_answer_goes_round(window: int, is_chunked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rings, dense = begin(generator, window, is_chunked, 20)
    for _ in range(3 * (window + SPARE)):
        step(generator, rings, dense, 1)


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("taken", [1, 4, SPARE])
def test_steps_taken_back_leave_nothing(taken: int, is_chunked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rings, dense = begin(generator, 6, is_chunked, 20)
    for _ in range(30):
        step(generator, rings, dense, 1)
    dense.k, dense.v = dense.k[..., :-taken, :], dense.v[..., :-taken, :]
    rings.take_back(taken)
    step(generator, rings, dense, 3)
    step(generator, rings, dense, 1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    window=st.integers(2, 12),
    is_chunked=st.booleans(),
    passes=st.lists(
        st.tuples(st.sampled_from([1, 2, 7, 35]), st.integers(0, 34), st.integers(0, 34)),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 2**16),
)
def test_pads_of_later_passes_are_nowhere(window, is_chunked, passes, seed) -> None:
    """A padded batch, and each of its sequences in rings of its own."""
    generator = torch.Generator().manual_seed(seed)
    both, _ = begin(generator, window, is_chunked, 20)
    alone = []
    for seq in range(2):
        shape = dataclasses.replace(both.shape, num_seqs=1)
        alone.append(WindowRings(shape))
        for name in ("k", "v"):
            getattr(alone[seq], name).copy_(getattr(both, name)[:, seq : seq + 1])
        for name in ("_positions", "_next"):
            getattr(alone[seq], name).copy_(getattr(both, name)[seq : seq + 1])
    for n, *pads in passes:
        pads = [min(x, n - 1) for x in pads]
        both.advance(99, n, torch.tensor(pads) if any(pads) else None)
        k = random(generator, len(PADS), KV_HEADS, n, D)
        v = random(generator, len(PADS), KV_HEADS, n, D_V)
        q = random(generator, len(PADS), HEADS, n, D)
        out = both.attend(q, *both.append(0, k, v), Softmax(0.3))
        assert out.isfinite().all()
        for seq, pad in enumerate(pads):
            rows = [x[seq : seq + 1, :, pad:] for x in (q, k, v)]
            alone[seq].advance(99, n - pad)
            expected = alone[seq].attend(rows[0], *alone[seq].append(0, *rows[1:]), Softmax(0.3))
            torch.testing.assert_close(out[seq, pad:], expected[0])


def test_one_row_changes_nothing_but_memory_in_place() -> None:
    generator = torch.Generator().manual_seed(0)
    rings, dense = begin(generator, 6, False, 20)
    step(generator, rings, dense, 5)
    step(generator, rings, dense, 1)
    places = {name: x.data_ptr() for name, x in vars(rings).items() if isinstance(x, torch.Tensor)}
    for _ in range(3):
        step(generator, rings, dense, 1)
    now = {name: x.data_ptr() for name, x in vars(rings).items() if isinstance(x, torch.Tensor)}
    assert now == places
    assert int(rings.seen) == dense.k.shape[3] - 1


def test_sequences_can_be_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    rings, _ = begin(generator, 6, False, 20)
    k, v = rings.k.clone(), rings.v.clone()
    rings.select_sequences(torch.tensor([1, 1, 0]))
    assert torch.equal(rings.k, k[:, [1, 1, 0]]) and torch.equal(rings.v, v[:, [1, 1, 0]])
    rings.advance(20, 1)
    q = random(generator, 3, HEADS, 1, D)
    rows = random(generator, 3, KV_HEADS, 1, D), random(generator, 3, KV_HEADS, 1, D_V)
    out = rings.attend(q, *rings.append(0, *rows), Softmax(0.3))
    assert out.shape == (3, 1, HEADS, D_V) and out.isfinite().all()


def test_what_is_lent_again_fits() -> None:
    k, v = torch.zeros(2, KV_HEADS, 3, D), torch.zeros(2, KV_HEADS, 3, D_V)
    sizes = dict(window=6, is_chunked=False)
    rings = WindowRings(ring_shape(k, v, **sizes))
    assert rings.shape == ring_shape(k, v, **sizes)
    assert rings.shape == ring_shape(k[:, :, :1], v[:, :, :1], **sizes)
    for other in [dict(window=7), dict(is_chunked=True), dict(num_layers=3)]:
        assert rings.shape != ring_shape(k, v, **sizes | other)
    assert rings.shape != ring_shape(k[:1], v[:1], **sizes)
    assert rings.shape != ring_shape(k.half(), v.half(), **sizes)
