"""append_kv and varlen_decode on a GPU: large shapes, CUDA graphs, flash-attn, compilations.

All other tests of tests/kernels run on the GPU too where there is one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import (
    Varlen,
    assert_accurate,
    assert_decode_accurate,
    assert_identical,
    plain_attention,
    random_varlen,
    run_decode,
)

from vlcache_triton.kernels import append, decode_kernels, reference
from vlcache_triton.kernels.append import append_kv
from vlcache_triton.kernels.decode import decode_workspace, varlen_decode

pytestmark = pytest.mark.gpu

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32

LARGE: dict[str, dict[str, Any]] = {
    "1x128K": dict(lengths_q=[1], lengths_k=[131072], num_heads=32, num_kv_heads=8, d=128),
    "1x32K, 4 rows": dict(lengths_q=[4], lengths_k=[32768], num_heads=8, num_kv_heads=2, d=128),
    "16x8K on pages": dict(
        lengths_q=[1] * 16,
        lengths_k=[8192 - 37 * i for i in range(16)],
        num_heads=8,
        num_kv_heads=2,
        d=128,
        page_size=16,
    ),
    "lengths 20-fold": dict(
        lengths_q=[1] * 64,
        lengths_k=[100 + 31 * i for i in range(64)],
        used=[90 + 31 * i for i in range(64)],
        num_heads=7,
        num_kv_heads=1,
        d=128,
    ),
    "16 rows": dict(lengths_q=[16, 11], lengths_k=[2000, 4096], num_heads=8, d=64),
    "head size 256": dict(lengths_q=[1, 3], lengths_k=[20000, 111], num_heads=8, d=256),
    "head sizes 96 and 80": dict(
        lengths_q=[2], lengths_k=[9999], num_heads=6, d=96, d_v=80, page_size=100
    ),
}


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("shapes", LARGE.values(), ids=LARGE.keys())
def test_large(device: torch.device, dtype: torch.dtype, shapes: dict[str, Any]) -> None:
    batch = random_varlen(**shapes, dtype=dtype, device=device)
    actual = run_decode(varlen_decode, batch)
    assert_decode_accurate(actual, batch)
    assert_identical(run_decode(varlen_decode, batch), actual)


SINKS = torch.linspace(-2.0, 12.0, 8)


@pytest.mark.parametrize(
    "options", [dict(window_size=(1000, -1)), dict(softcap=30.0), dict(sinks=SINKS)]
)
def test_large_with_options(device: torch.device, options: dict[str, Any]) -> None:
    if "sinks" in options:
        options = dict(sinks=SINKS.to(device))
    batch = random_varlen([3, 1], [20000, 777], num_heads=8, dtype=BFLOAT, device=device)
    assert_decode_accurate(run_decode(varlen_decode, batch, **options), batch, **options)


@pytest.mark.parametrize("n", [1, 4])
def test_equals_sdpa(device: torch.device, n: int) -> None:
    """Torch's own attention with the KV heads repeated, in the same dtype and in fp32."""
    batch = random_varlen([n], [8192], num_heads=32, num_kv_heads=8, d=128, device=device)
    out, _ = run_decode(varlen_decode, batch)
    visible = torch.ones(n, 8192, dtype=torch.bool, device=device).tril(8192 - n)
    q, k, v = (x.transpose(0, 1)[None] for x in (batch.q, batch.k, batch.v))
    same_dtype, expected = (
        F.scaled_dot_product_attention(*x, attn_mask=visible)[0].transpose(0, 1)
        for x in (
            (q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)),
            (q.float(), k.float().repeat_interleave(4, 1), v.float().repeat_interleave(4, 1)),
        )
    )
    assert_accurate(out, same_dtype, expected, floor=1e-4)


FLASH: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "packed": (dict(lengths_q=[1, 5, 16], lengths_k=[2000, 111, 63]), {}),
    "more rows than keys": (dict(lengths_q=[16, 1], lengths_k=[4, 300]), {}),
    "pages": (dict(lengths_q=[1, 5], lengths_k=[2000, 111], page_size=256), {}),
    "window": (dict(lengths_q=[2, 5], lengths_k=[2000, 111]), dict(window_size=(100, 0))),
    "not causal": (dict(lengths_q=[2, 5], lengths_k=[2000, 111]), dict(causal=False)),
    "softcap": (dict(lengths_q=[2, 5], lengths_k=[2000, 111]), dict(softcap=5.0)),
    "scale": (dict(lengths_q=[2, 5], lengths_k=[500, 111]), dict(softmax_scale=0.3)),
}


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize(("shapes", "options"), FLASH.values(), ids=FLASH.keys())
def test_equals_flash_attn(device, dtype: torch.dtype, shapes, options: dict[str, Any]) -> None:
    """The same names mean the same: flash-attn 2.8 as the oracle, its own error as the bound."""
    flash_attn = pytest.importorskip("flash_attn")
    batch = random_varlen(**shapes, num_heads=8, d=128, dtype=dtype, device=device)
    for x in (batch.k, batch.v):  # it reads whole pages
        x.nan_to_num_(nan=0.0)
    if batch.block_table is not None:
        batch.block_table.clamp_(max=batch.k.shape[0] - 1)
    arguments = {"causal": True} | options
    theirs = flash_attn.flash_attn_varlen_func(
        batch.q,
        batch.k,
        batch.v,
        batch.cu_seqlens_q,
        batch.cu_seqlens_k,
        batch.max_seqlen_q,
        batch.max_seqlen_k,
        block_table=batch.block_table,
        **arguments,
    )
    ours, _ = run_decode(varlen_decode, batch, **arguments)
    expected, _ = run_decode(
        reference.varlen_decode, replace(batch, q=batch.q.float()), **arguments
    )
    plain = plain_attention(batch, **arguments)
    assert_accurate(theirs, plain, expected)  # else the oracle means something else
    assert_accurate(ours, theirs, expected, floor=1e-4)


def test_flash_attn_reads_the_ragged_layout(device: torch.device) -> None:
    """Segments with head room are sequences of one KV head to flash-attn's own kernel as well."""
    interface = pytest.importorskip("flash_attn.flash_attn_interface")
    used = [90 + 31 * i for i in range(16)]
    capacities = [n + 10 for n in used]
    batch = random_varlen(
        [1] * 16, capacities, used=used, num_heads=4, num_kv_heads=1, d=128, device=device
    )
    for x in (batch.k, batch.v):
        x.nan_to_num_(nan=0.0)
    # The public function does not take seqused_k; what it calls does.
    theirs = interface._flash_attn_varlen_forward(
        batch.q,
        batch.k,
        batch.v,
        batch.cu_seqlens_q,
        batch.cu_seqlens_k,
        1,
        batch.max_seqlen_k,
        0.0,
        128**-0.5,
        True,
        seqused_k=batch.seqused_k,
    )[0]
    ours, _ = run_decode(varlen_decode, batch)
    expected, _ = run_decode(reference.varlen_decode, replace(batch, q=batch.q.float()))
    assert_accurate(theirs, plain_attention(batch), expected)
    assert_accurate(ours, theirs, expected, floor=1e-4)


CAPACITIES = [700, 64, 111]
STEPS = [[690, 60, 109], [0, 0, 0], [5, 62, 1], [698, 1, 63]]  # live lengths before each step
SHAPES: dict[str, dict[str, Any]] = {
    "packed": dict(lengths_q=[1] * 3, lengths_k=CAPACITIES, num_heads=8, d=128),
    "2 rows on pages": dict(lengths_q=[2] * 3, lengths_k=CAPACITIES, num_heads=4, page_size=16),
    "ragged": dict(lengths_q=[1] * 3, lengths_k=CAPACITIES, num_heads=7, num_kv_heads=1, d=80),
    "direct": dict(lengths_q=[1] * 3, lengths_k=[60, 62, 64], num_heads=4),
}


@pytest.mark.parametrize("preallocated", [True, False])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_a_graph_replays_as_lengths_change(device, shapes, preallocated: bool) -> None:
    """Append and decode, captured once, equal eager steps from any lengths; caches too."""
    n, capacities = shapes["lengths_q"][0], shapes["lengths_k"]
    batch = random_varlen(**shapes, used=[1] * 3, device=device)
    used = batch.seqused_k
    assert used is not None
    new = [torch.zeros(3, n, *x.shape[-2:], dtype=HALF, device=device) for x in (batch.k, batch.v)]
    memory: dict[str, torch.Tensor] = {}
    if preallocated:
        memory["out"] = torch.empty_like(batch.q)
        memory["workspace"] = decode_workspace(batch.q, batch.v, 3, n, batch.max_seqlen_k)

    def step(x: Varlen, memory: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        append_kv(*new, x.k, x.v, x.cu_seqlens_k, x.seqused_k, block_table=x.block_table)
        return run_decode(varlen_decode, x, **memory)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, which a capture may not
        step(batch, memory)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(batch, memory)

    generator = torch.Generator(device).manual_seed(1)
    for x in (batch.k, batch.v):
        x.normal_(generator=generator)
    for lengths in STEPS:
        live = [min(length, most - n) for length, most in zip(lengths, capacities, strict=True)]
        used.copy_(torch.tensor(live, dtype=torch.int32))
        for x in (batch.q, *new):
            x.normal_(generator=generator)
        eager = replace(batch, k=batch.k.clone(), v=batch.v.clone(), seqused_k=used.clone())
        expected = step(eager, {})
        graph.replay()
        assert used.tolist() == [length + n for length in live]
        assert_identical(result, expected)
        assert_identical([batch.k, batch.v], [eager.k, eager.v])
        assert_decode_accurate(result, batch)


@pytest.mark.parametrize("length", [60, 2000], ids=["direct", "split"])
def test_the_host_never_waits(device: torch.device, length: int) -> None:
    batch = random_varlen([1, 1], [length, 64], used=[length - 1, 0], device=device)
    new = [torch.zeros(2, 1, *x.shape[-2:], dtype=HALF, device=device) for x in (batch.k, batch.v)]
    assert batch.seqused_k is not None
    arguments = (*new, batch.k, batch.v, batch.cu_seqlens_k)
    append_kv(*arguments, batch.seqused_k.clone())  # compile
    run_decode(varlen_decode, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        append_kv(*arguments, batch.seqused_k)
        out, _ = run_decode(varlen_decode, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batch.seqused_k.tolist() == [length, 1]
    assert not out[1].any()  # its only key's value is 0


@pytest.mark.parametrize("page_size", [None, 16])
def test_lengths_compile_nothing_new(device: torch.device, page_size: int | None) -> None:
    """One variant that is direct and one that splits the keys, however long they are; and wherever
    a layer's lengths begin in those of all layers."""

    def compiled() -> int:
        kernels = (decode_kernels._split_kernel, decode_kernels._combine_splits_kernel)
        caches = (x.device_caches for x in (*kernels, append._append_kernel))
        return sum(len(cache[device.index or 0][0]) for cache in caches)

    def step(n: int) -> None:
        batch = random_varlen([1, 1], [n, 1], used=[n - 1, 0], page_size=page_size, device=device)
        batch.seqused_k = torch.stack([batch.seqused_k] * 4).view(-1)[n % 3 :][:2]
        batch.seqused_k.copy_(torch.tensor([n - 1, 0]))
        new = [
            torch.zeros(2, 1, *x.shape[-2:], dtype=HALF, device=device) for x in (batch.k, batch.v)
        ]
        append_kv(
            *(*new, batch.k, batch.v, batch.cu_seqlens_k, batch.seqused_k),
            block_table=batch.block_table,
        )
        run_decode(varlen_decode, batch)

    step(30)
    step(3000)
    before = compiled()
    assert before > 0
    for n in (1, 16, 63, 64, 65, 111, 2000, 2048, 10000, 100000):
        step(n)
    assert compiled() == before
