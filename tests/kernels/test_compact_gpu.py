"""Compaction on a GPU: large caches, captured graphs, no waiting, nothing compiled anew.

All other tests of tests/kernels run on the GPU too where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kept import Case, assert_in_place, assert_out_of_place, kept_rows, pools, random_case
from support import assert_identical
from torch import Tensor

from vlcache_triton.kernels import compact, reference
from vlcache_triton.kernels.compact import compact_kv, compact_kv_

pytestmark = pytest.mark.gpu

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def out_of_place(case: Case, out: list[Tensor], starts: Tensor, table: Tensor | None) -> None:
    target: dict[str, Any] = dict(cu_seqlens_out=starts, out_block_table=table)
    compact_kv(case.k, case.v, out_k=out[0], out_v=out[1], **target, **case.selection)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("share", [0.1, 0.999])
def test_large(device, dtype: torch.dtype, page_size: int | None, share: float) -> None:
    """A tenth, and nearly all, of long sequences; what moves in place overlaps itself."""
    lengths = [32768, 5001]
    counts = [int(n * share) - h for n in lengths for h in range(4)]
    shapes = dict(num_kv_heads=4, d=128, dtype=dtype, page_size=page_size, device=device)
    case = random_case(lengths, counts, **shapes)
    for strided in (False, True):
        assert_out_of_place(case, page_size, strided=strided)
        assert_in_place(case, strided=strided)


@pytest.mark.parametrize(("d", "d_v"), [(64, 64), (80, 48), (256, 256)])
def test_in_place_is_right_every_time(device: torch.device, d: int, d_v: int) -> None:
    """Many programs and many tiles: a row that was written too early would show now and then."""
    n, count, seqs, heads = 20000, 15000, 4, 8
    counts = [count] * seqs * heads
    case = random_case([n] * seqs, counts, num_kv_heads=heads, d=d, d_v=d_v, device=device)
    rows = case.indices[: seqs * heads * count].view(seqs, heads, count).long()
    rows = rows.transpose(1, 2) + n * torch.arange(seqs, device=device)[:, None, None]
    head = torch.arange(heads, device=device)
    expected = []
    for x in (case.k, case.v):
        expected.append(x.clone())
        expected[-1].view(seqs, n, heads, -1)[:, :count] = x[rows, head]
    for _ in range(20):
        moved = [case.k.clone(), case.v.clone()]
        compact_kv_(*moved, **case.selection)
        assert_identical(moved, expected)


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_graph_replays_with_other_indices(device: torch.device, page_size: int | None) -> None:
    """Out of place, then in place: captured once, exact for any indices and counts."""
    lengths, most = [700, 64], 64
    shapes = dict(d=128, page_size=page_size, device=device)
    case = random_case(lengths, [most] * 4, **shapes)
    out, starts, table = pools(case, page_size)
    before = case.k.clone(), case.v.clone()

    def step() -> None:
        out_of_place(case, out, starts, table)
        compact_kv_(case.k, case.v, **case.selection)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, which a capture may not
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    for seed, counts in enumerate([[60, 64, 10, 64], [1, 0, 64, 3], [64] * 4]):
        other = random_case(lengths, counts, seed=seed, **shapes)
        case.indices[: sum(counts)] = other.indices[: sum(counts)]
        case.cu_kept.copy_(other.cu_kept)
        for x, whole in zip((case.k, case.v), before, strict=True):
            x.copy_(whole)
        for x in out:
            x.fill_(torch.nan)
        expected_out = [x.clone() for x in out]
        expected = [x.clone() for x in before]
        target: dict[str, Any] = dict(cu_seqlens_out=starts, out_block_table=table)
        target |= dict(out_k=expected_out[0], out_v=expected_out[1])
        reference.compact_kv(*before, **target, **case.selection)
        reference.compact_kv_(*expected, **case.selection)
        graph.replay()
        assert_identical(out, expected_out)
        assert_identical([case.k, case.v], expected)


def test_the_host_never_waits_and_no_memory_is_taken(device: torch.device) -> None:
    case = random_case([70000, 64], [6000, 64000, 10, 64], device=device)
    out, starts, table = pools(case)
    out_of_place(case, out, starts, table)  # compiles
    compact_kv_(case.k.clone(), case.v.clone(), **case.selection)
    expected = [kept_rows(case, case.k, s) for s in range(4)]
    selection = case.selection
    for x in out:
        x.fill_(torch.nan)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out_of_place(case, out, starts, table)
        compact_kv_(case.k, case.v, **selection)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == before
    for s, (first, rows) in enumerate(zip(starts.tolist(), expected, strict=False)):
        i, head = divmod(s, 2)
        assert_identical([out[0][first : first + len(rows), 0]], [rows])
        assert_identical([case.k[70000 * i :][: len(rows), head]], [rows])


@pytest.mark.parametrize("page_size", [None, 16])
def test_lengths_and_layers_compile_nothing_new(device, page_size: int | None) -> None:
    kernels = (compact._compact_kernel, compact._compact_in_place_kernel)

    def compiled() -> int:
        return sum(len(x.device_caches[device.index or 0][0]) for x in kernels)

    def run(n: int, layer: int = 0) -> None:
        """A layer's starts lie anywhere in those of all layers."""
        counts = [n // 2 + 1, n, 1, 0]
        case = random_case([n, n], counts, page_size=page_size, before=layer, device=device)
        out, starts, table = pools(case, page_size)
        starts, case.cu_kept = (
            torch.cat([x.new_zeros(layer), x])[layer:] for x in (starts, case.cu_kept)
        )
        out_of_place(case, out, starts, table)
        compact_kv_(case.k, case.v, **case.selection)

    run(30)
    before = compiled()
    assert before >= 2
    for n in (1, 16, 63, 64, 65, 111, 2000, 2048, 10000):
        run(n)
        run(n, layer=n % 7 + 1)
    assert compiled() == before
