"""Compaction on a GPU: large caches, captured graphs, no waiting, nothing compiled anew."""

from __future__ import annotations

import pytest
import torch
from kept import Case, assert_in_place, assert_out_of_place, pools, random_case
from support import FRAME, cumulative

from vlcache_triton.kernels import compact
from vlcache_triton.kernels.compact import compact_kv, compact_kv_

pytestmark = pytest.mark.gpu

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def out_of_place(case: Case, out: list[torch.Tensor], starts: torch.Tensor) -> None:
    compact_kv(case.k, case.v, out_k=out[0], out_v=out[1], cu_seqlens_out=starts, **case.selection)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("page_size", [None, 16])
def test_large(device: torch.device, dtype: torch.dtype, page_size: int | None) -> None:
    """A tenth, and nearly all, of long sequences; what moves in place overlaps itself."""
    for share in (10, 1):
        lengths = [32768, 5001]
        counts = [n // share - 1 for n in lengths for _ in range(8)]
        case = random_case(
            lengths,
            counts,
            num_kv_heads=8,
            d=128,
            dtype=dtype,
            page_size=page_size,
            device=device,
        )
        assert_out_of_place(case, page_size)
        assert_in_place(case)


def test_in_place_is_right_every_time(device: torch.device) -> None:
    """Many programs and many tiles: a row that was written too early would show now and then."""
    case = random_case([20000] * 4, [15000] * 32, num_kv_heads=8, d=128, device=device)
    expected = None
    for _ in range(20):
        k, v = case.k.clone(), case.v.clone()
        compact_kv_(k, v, **case.selection)
        if expected is None:
            expected = k, v
            out, starts, _ = pools(case, None)
            out_of_place(case, out, starts)
            for segment in (0, 13, 31):
                i, head = divmod(segment, 8)
                rows = k[20000 * i : 20000 * i + 15000, head]
                pool = int(starts[segment])
                assert torch.equal(rows, out[0][pool : pool + 15000, 0])
        assert torch.equal(k, expected[0]) and torch.equal(v, expected[1])


def test_a_graph_replays_with_other_indices(device: torch.device) -> None:
    lengths, most = [700, 64], 64
    first = random_case(lengths, [60, 64, 10, 64], d=128, device=device)
    capacities = [most + 2] * 4
    starts = cumulative(capacities, device)
    out = [x.new_full((sum(capacities), 1, 128), FRAME) for x in (first.k, first.v)]
    indices = torch.zeros(4 * most, dtype=torch.int32, device=device)
    cu_kept = torch.zeros(5, dtype=torch.int32, device=device)
    arguments = (first.k, first.v, first.cu_seqlens_k, indices, cu_kept, *out, starts)
    compact_kv(*arguments, max_kept=most)  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compact_kv(*arguments, max_kept=most)
    for seed, counts in enumerate([[60, 64, 10, 64], [1, 0, 64, 3], [64] * 4]):
        case = random_case(lengths, counts, d=128, device=device, seed=seed)
        first.k.copy_(case.k)
        first.v.copy_(case.v)
        indices[: sum(counts)] = case.indices[: sum(counts)]
        cu_kept.copy_(case.cu_kept)
        for x in out:
            x.fill_(FRAME)
        graph.replay()
        expected = [torch.full_like(x, FRAME) for x in out]
        compact_kv(
            case.k,
            case.v,
            out_k=expected[0],
            out_v=expected[1],
            cu_seqlens_out=starts,
            **case.selection,
        )
        assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


def test_the_host_never_waits(device: torch.device) -> None:
    case = random_case([700, 64], [60, 64, 10, 64], device=device)
    out, starts, _ = pools(case, None)
    selection = case.selection
    out_of_place(case, out, starts)  # compile
    compact_kv_(case.k.clone(), case.v.clone(), **selection)
    expected = [x.clone() for x in out]
    for x in out:
        x.fill_(FRAME)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compact_kv(case.k, case.v, out_k=out[0], out_v=out[1], cu_seqlens_out=starts, **selection)
        compact_kv_(case.k, case.v, **selection)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


@pytest.mark.parametrize("page_size", [None, 16])
def test_lengths_compile_nothing_new(device: torch.device, page_size: int | None) -> None:
    kernels = (compact._compact_kernel, compact._compact_in_place_kernel)

    def compiled() -> int:
        return sum(len(x.device_caches[device.index or 0][0]) for x in kernels)

    def run(n: int) -> None:
        case = random_case([n, n], [n // 2 + 1, n, 1, 0], page_size=page_size, device=device)
        out, starts, _ = pools(case, None)
        out_of_place(case, out, starts)
        compact_kv_(case.k, case.v, **case.selection)

    run(30)
    before = compiled()
    assert before > 0
    for n in (1, 16, 63, 64, 65, 111, 2000, 2048, 10000):
        run(n)
    assert compiled() == before
