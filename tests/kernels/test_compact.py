"""compact_kv, compact_kv_ and append_kv are exact, and write nothing but their rows."""

import pytest
import torch
from support import cumulative

from vlcache_triton import reference
from vlcache_triton.kernels.compact import compact_kv, compact_kv_
from vlcache_triton.kernels.decode import append_kv

SHAPES = [(2, 64, 48), (1, 16, 16), (3, 80, 80)]
LENGTHS, KEEP = [300, 0, 111], [100, 0, 111]


def case(num_kv_heads, d, d_v, device):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    k = torch.randn(total, num_kv_heads, d, device=device)
    v = torch.randn(total, num_kv_heads, d_v, device=device)
    counts = (torch.tensor(x, dtype=torch.int32, device=device) for x in (KEEP, [10, 0, 5]))
    selection = reference.select_tokens(
        torch.randn(num_kv_heads, total, device=device),
        cumulative(LENGTHS, device),
        *counts,
        max_seqlen=300,
        total_kept=sum(KEEP) * num_kv_heads,
    )
    return k, v, cumulative(LENGTHS, device), *selection


@pytest.mark.parametrize("shape", SHAPES)
def test_out_of_place(shape, device):
    arguments = case(*shape, device)
    capacities = [n + 5 for n in KEEP for _ in range(shape[0])]
    pools = []
    for compact in (reference.compact_kv, compact_kv):
        out = [torch.full((sum(capacities), 1, n), 7.0, device=device) for n in shape[1:]]
        compact(*arguments, *out, cumulative(capacities, device), max_kept=111)
        pools.append(out)
    assert torch.equal(pools[0][0], pools[1][0]) and torch.equal(pools[0][1], pools[1][1])


@pytest.mark.parametrize("shape", SHAPES)
def test_in_place(shape, device):
    k, v, *rest = case(*shape, device)
    expected, moved = (k.clone(), v.clone()), (k.clone(), v.clone())
    reference.compact_kv_(*expected, *rest, max_kept=111)
    compact_kv_(*moved, *rest, max_kept=111)
    assert torch.equal(moved[0], expected[0]) and torch.equal(moved[1], expected[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_append_drops_what_has_no_room(shape, device):
    k, v, cu_seqlens_k, *_ = case(*shape, device)
    new = [torch.randn(3, 5, shape[0], n, device=device) for n in shape[1:]]
    results = []
    for append in (reference.append_kv, append_kv):
        used = torch.tensor([290, 0, 109], dtype=torch.int32, device=device)
        caches = k.clone(), v.clone()
        append(*new, *caches, cu_seqlens_k, used)
        results.append((*caches, used))
    for got, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(got, expected)
