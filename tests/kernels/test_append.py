"""append_kv is exact, writes its rows and nothing else, and decoding sees what it wrote.

What it refuses is in test_decode_launch.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    MEANT_INFINITIES,
    NO_PAGE,
    Varlen,
    assert_frame_is_intact,
    assert_identical,
    framed,
    random_varlen,
    run_decode,
    vast_zeros,
)

from vlcache_triton.kernels import reference
from vlcache_triton.kernels.append import append_kv
from vlcache_triton.kernels.decode import varlen_decode

pytestmark = MEANT_INFINITIES

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def cache(capacities: list[int], used: list[int], **shapes: Any) -> Varlen:
    """A cache whose rows behind the live ones, and in pages nobody owns, are NaN."""
    live = [min(n, capacity) for n, capacity in zip(used, capacities, strict=True)]
    batch = random_varlen([0] * len(used), capacities, used=live, **shapes)
    batch.seqused_k = torch.tensor(used, dtype=torch.int32, device=batch.k.device)
    return batch


def new_rows(batch: Varlen, n: int, seed: int = 7) -> list[torch.Tensor]:
    """`[num_seqs, n, num_kv_heads, d]` of K and of V for a cache."""
    generator = torch.Generator().manual_seed(seed)
    num_seqs = batch.cu_seqlens_k.numel() - 1
    return [
        torch.randn(num_seqs, n, *x.shape[-2:], generator=generator).to(x.device, x.dtype)
        for x in (batch.k, batch.v)
    ]


def append(
    function: Any, batch: Varlen, new: list[torch.Tensor], k: torch.Tensor, v: torch.Tensor
) -> list[torch.Tensor]:
    """Append to k and v, which hold the batch's cache; gives them and the lengths."""
    assert batch.seqused_k is not None
    used = batch.seqused_k.clone()
    arguments = (*new, k, v, batch.cu_seqlens_k, used)
    assert function(*arguments, block_table=batch.block_table) is None
    return [k, v, used]


def assert_equals_reference(batch: Varlen, n: int) -> None:
    """The same bits everywhere, in caches whose surroundings stay as they were."""
    new = new_rows(batch, n)
    expected = append(reference.append_kv, batch, new, batch.k.clone(), batch.v.clone())
    (k, k_frame), (v, v_frame) = framed(batch.k), framed(batch.v)
    given = [x.clone() for x in new]
    assert_identical(append(append_kv, batch, new, k, v), expected)
    assert_frame_is_intact(k_frame)
    assert_frame_is_intact(v_frame)
    assert_identical(new, given)


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one row": (1, dict(capacities=[9, 5], used=[3, 0])),
    "one row of one head": (1, dict(capacities=[64, 1, 9], used=[63, 0, 1], num_kv_heads=1)),
    "rows of many heads": (
        5,
        dict(capacities=[40, 9], used=[30, 1], num_heads=8, num_kv_heads=8, d=128, dtype=BFLOAT),
    ),
    "16 rows of 3 heads": (
        16,
        dict(
            capacities=[30, 16],
            used=[13, 0],
            num_heads=3,
            num_kv_heads=3,
            d=80,
            d_v=48,
            dtype=FLOAT,
        ),
    ),
    "to the last row": (4, dict(capacities=[10, 4], used=[6, 0], d=96)),
    "not all rows have room": (3, dict(capacities=[5, 5, 5, 5], used=[3, 5, 1, 4], d=16)),
    "lengths beyond their capacity": (2, dict(capacities=[5, 5, 5], used=[6, 900, 2])),
    "segments without capacity": (2, dict(capacities=[0, 4, 0], used=[0, 1, 0])),
    "no rows": (0, dict(capacities=[5, 5], used=[3, 5])),
    "no sequences": (1, dict(capacities=[], used=[])),
    "pages of 1": (3, dict(capacities=[9, 20], used=[2, 17], page_size=1, dtype=BFLOAT)),
    "pages of 16": (5, dict(capacities=[63, 17, 40], used=[30, 11, 0], page_size=16, d=80)),
    "pages of 100": (2, dict(capacities=[63, 250], used=[60, 99], page_size=100, dtype=FLOAT)),
    "pages without room": (6, dict(capacities=[32, 32], used=[30, 40], page_size=16)),
    "head size 256": (1, dict(capacities=[9, 9], used=[3, 8], d=256, d_v=64, dtype=BFLOAT)),
    "head sizes 1 and 40": (2, dict(capacities=[9, 9], used=[3, 8], d=1, d_v=40)),
}


@pytest.mark.parametrize(("n", "shapes"), CASES.values(), ids=CASES.keys())
def test_equals_reference(device: torch.device, n: int, shapes: dict[str, Any]) -> None:
    assert_equals_reference(cache(**shapes, device=device), n)


segments = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 25)), min_size=1, max_size=4)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(segments, st.integers(0, 9), st.integers(1, 3), st.integers(0, 2**31))
def test_any_lengths(pairs, n: int, num_kv_heads: int, seed: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    capacities, used = map(list, zip(*pairs, strict=True))
    heads = dict(num_heads=num_kv_heads, num_kv_heads=num_kv_heads, d=16)
    assert_equals_reference(cache(capacities, used, **heads, seed=seed, device=device), n)


def test_what_is_written_where(device: torch.device) -> None:
    """Without the reference: three sequences with room for all, for one and for no row."""
    batch = cache([4, 3, 2], [1, 2, 2], device=device)
    k, v = new_rows(batch, 2)
    before = batch.k.clone(), batch.v.clone()
    _, _, used = append(append_kv, batch, [k, v], batch.k, batch.v)
    assert used.tolist() == [3, 4, 4]
    for x, new, old in ((batch.k, k, before[0]), (batch.v, v, before[1])):
        assert torch.equal(x[1:3], new[0])
        assert torch.equal(x[6], new[1, 0])
        untouched = [0, 3, 4, 5, 7, 8]
        assert_identical([x[untouched]], [old[untouched]])


def test_unused_table_entries_are_never_read(device: torch.device) -> None:
    """Pages come when they are needed: the last sequence has but the one it writes to."""
    batch = cache([64, 48, 16], [47, 40, 3], page_size=16, device=device)
    assert batch.block_table is not None
    assert batch.block_table[2, 1] == NO_PAGE
    assert_equals_reference(batch, 8)


def test_strides_of_the_rows_change_nothing(device: torch.device) -> None:
    """New rows as Transformers has them, `[num_seqs, num_kv_heads, n, d]`, and caches [H, S, D]."""
    batch = cache([40, 30], [20, 5], d=80, device=device)
    new = new_rows(batch, 3)
    expected = append(append_kv, batch, new, batch.k.clone(), batch.v.clone())
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in new]
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (batch.k, batch.v))
    assert not (strided[0].is_contiguous() or k.is_contiguous())
    assert_identical(append(append_kv, batch, strided, k, v), expected)


def test_rows_one_by_one_are_rows_together(device: torch.device) -> None:
    batch = cache([40, 30], [20, 28], page_size=16, device=device)
    new = new_rows(batch, 4)
    expected = append(append_kv, batch, new, batch.k.clone(), batch.v.clone())
    k, v = batch.k.clone(), batch.v.clone()
    for i in range(4):
        row = [x[:, i : i + 1] for x in new]
        *_, batch.seqused_k = append(append_kv, batch, row, k, v)
    assert batch.seqused_k is not None
    assert_identical([k, v, batch.seqused_k], expected)


@pytest.mark.parametrize("page_size", [None, 16])
def test_decoding_sees_the_new_rows(device: torch.device, page_size: int | None) -> None:
    """Append, then decode, equals decoding over a cache that had the rows from the start."""
    lengths, capacities, n = [111, 30, 63], [120, 32, 68], 2
    shapes: dict[str, Any] = dict(num_heads=4, num_kv_heads=1, d=80, page_size=page_size)
    full = random_varlen(
        [n] * 3, capacities, used=[length + n for length in lengths], **shapes, device=device
    )
    packed = random_varlen([n] * 3, capacities, **(shapes | {"page_size": None}), device=device)
    short = random_varlen([n] * 3, capacities, used=lengths, **shapes, device=device)
    assert short.seqused_k is not None
    rows = (short.cu_seqlens_k[:-1] + short.seqused_k)[:, None] + torch.arange(n, device=device)
    append_kv(
        packed.k[rows],
        packed.v[rows],
        short.k,
        short.v,
        short.cu_seqlens_k,
        short.seqused_k,
        block_table=short.block_table,
    )
    assert short.seqused_k.tolist() == [113, 32, 65]
    assert_identical([short.k, short.v], [full.k, full.v])
    assert_identical(run_decode(varlen_decode, short), run_decode(varlen_decode, full))


@pytest.mark.parametrize("page_size", [None, 16])
def test_past_2_to_the_31_elements(device: torch.device, page_size: int | None) -> None:
    """The sequence's rows, K and V side by side, lie behind 2^31 elements."""
    first = 2**31 // 128
    memory = vast_zeros((first + 32) * 128, HALF, device).view(-1, 2, 64)
    batch = cache([32], [14], num_kv_heads=1, page_size=page_size, device=device)
    new = new_rows(batch, 4)
    caches = [memory[:, :1], memory[:, 1:]]
    batch.cu_seqlens_k += first
    if page_size is not None:
        caches = [x.unflatten(0, (-1, page_size)) for x in caches]
        pages = [first // page_size, first // page_size + 1]
        batch.block_table = torch.tensor([pages], dtype=torch.int32, device=device)
    append(append_kv, batch, new, *caches)
    assert_identical([memory[first + 14 : first + 18]], [torch.cat([x[0] for x in new], 1)])
    memory[first + 14 : first + 18] = 0
    assert not memory[-64:].any()
    assert not memory[:64].any()
