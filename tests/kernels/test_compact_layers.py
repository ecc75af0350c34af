"""compact_layers is compact_kv of each layer, to the bit, in one launch for all that lie alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Recorder, assert_identical
from torch import Tensor

from vlcache_triton.kernels import compact, reference
from vlcache_triton.kernels.compact import compact_kv, compact_layers

HEADS, D, D_V, ROOM = 2, 24, 16, 3
LENGTHS = [5, 63, 0, 40]


def drawn(num_layers: int, device: torch.device, dtype: torch.dtype = torch.float32) -> dict:
    """Arguments of compact_layers: layers that keep unequal shares, pools of NaN."""
    generator = torch.Generator().manual_seed(num_layers)

    def floats(d: int) -> Tensor:
        x = torch.randn(sum(LENGTHS), HEADS, d, generator=generator)
        return x.to(device, dtype)

    kept = []
    for _ in range(num_layers):
        for n in LENGTHS:
            for _ in range(HEADS):
                count = int(torch.randint(0, n + 1, (), generator=generator))
                kept.append(torch.randperm(n, generator=generator)[:count].sort().values)
    counts = torch.tensor([len(x) for x in kept]).view(num_layers, -1)
    ends = (counts + ROOM).flatten().cumsum(0).view(num_layers, -1)
    starts = torch.cat([ends[:, :1] - counts[:, :1] - ROOM, ends], 1)
    rows = int(ends[-1, -1])
    zero = torch.zeros(1, dtype=torch.int64)
    return dict(
        k=[floats(D) for _ in range(num_layers)],
        v=[floats(D_V) for _ in range(num_layers)],
        cu_seqlens_k=torch.cat([zero, torch.tensor(LENGTHS).cumsum(0)]).int().to(device),
        indices=torch.cat(kept).int().to(device),
        cu_kept=torch.cat([zero, counts.flatten().cumsum(0)]).int().to(device),
        out_k=torch.full((rows, 1, D), torch.nan, dtype=dtype, device=device),
        out_v=torch.full((rows, 1, D_V), torch.nan, dtype=dtype, device=device),
        cu_seqlens_out=starts.int().to(device),
        max_kept=int(counts.max()),
    )


def pools_after(operation: Any, arguments: dict) -> list[Tensor]:
    pools = {name: arguments[name].clone() for name in ("out_k", "out_v")}
    assert operation(**(arguments | pools)) is None
    return list(pools.values())


def layer_by_layer(k, v, cu_seqlens_k, indices, cu_kept, out_k, out_v, cu_seqlens_out, max_kept):
    for i, starts in enumerate(cu_seqlens_out):
        kept = cu_kept[i * (len(starts) - 1) :][: len(starts)].clone()
        source = (k[i], v[i], cu_seqlens_k, indices, kept)
        compact_kv(*source, out_k, out_v, starts, max_kept=max_kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_as_layer_by_layer(device, num_layers: int, dtype: torch.dtype) -> None:
    arguments = drawn(num_layers, device, dtype)
    expected = pools_after(layer_by_layer, arguments)
    assert_identical(pools_after(reference.compact_layers, arguments), expected)
    assert_identical(pools_after(compact_layers, arguments), expected)
    assert expected[0].isnan().any()  # head room


def test_layers_may_lie_apart_strided_and_unaligned(device) -> None:
    """One launch for each way to lie; every layer finds its own place."""
    arguments = drawn(5, device)
    k, v = arguments["k"], arguments["v"]
    k[1] = torch.cat([k[1], k[1]], -1)[..., :D]  # strided
    flat = torch.cat([v[3].new_zeros(1), v[3].flatten()])
    v[3] = flat[1:].view_as(v[3])  # 4 bytes off
    expected = pools_after(reference.compact_layers, arguments)
    assert_identical(pools_after(compact_layers, arguments), expected)


def test_launches(device, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = drawn(5, device)
    recorder = Recorder()
    monkeypatch.setattr(compact, "_compact_kernel", recorder)
    compact_layers(**arguments)
    (grid,) = recorder.grids
    assert grid[0] == 5 * len(LENGTHS) * HEADS
    assert recorder.arguments[0]["layers_ptr"].tolist() == [
        [i, k.data_ptr(), v.data_ptr()]
        for i, (k, v) in enumerate(zip(arguments["k"], arguments["v"], strict=True))
    ]
    arguments["k"][1] = torch.cat([arguments["k"][1]] * 2, -1)[..., :D]
    compact_layers(**arguments)
    tables = [x["layers_ptr"][:, 0].tolist() for x in recorder.arguments[1:]]
    assert tables == [[0, 2, 3, 4], [1]]


@pytest.mark.parametrize("change", ["no layers", "nothing kept", "no sequences"])
def test_nothing_to_move_launches_nothing(device, monkeypatch, change: str) -> None:
    recorder = Recorder()
    monkeypatch.setattr(compact, "_compact_kernel", recorder)
    arguments = drawn(2, device)
    if change == "no layers":
        arguments |= dict(k=[], v=[])
    elif change == "nothing kept":
        arguments["max_kept"] = 0
    else:
        arguments["cu_seqlens_k"] = arguments["cu_seqlens_k"][:1]
        arguments["cu_kept"] = arguments["cu_kept"][:1]
        arguments["cu_seqlens_out"] = arguments["cu_seqlens_out"][:, :1].contiguous()
    compact_layers(**arguments)
    assert recorder.grids == []


BAD: dict[str, Any] = {
    "v: got 1 layers, expected 2, as k": lambda x: x["v"].pop(),
    r"k\[1\]: got \(107, 2, 24\)": lambda x: x["k"].insert(1, x["k"].pop()[1:]),
    r"v\[1\]: .*float16": lambda x: x["v"].insert(1, x["v"].pop().half()),
    r"k\[1\]: got strides": lambda x: x["k"].append(x["k"].pop().mT.contiguous().mT),
    "cu_kept: got shape": lambda x: x.update(cu_kept=x["cu_kept"][1:]),
    "cu_seqlens_out: got shape": lambda x: x.update(cu_seqlens_out=x["cu_seqlens_out"][:1]),
    "out_k: got dtype": lambda x: x.update(out_k=x["out_k"].half()),
    "out_v: got shape": lambda x: x.update(out_v=x["out_v"][..., 1:]),
    "indices: got dtype": lambda x: x.update(indices=x["indices"].long()),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals_name_the_argument(device, message: str) -> None:
    arguments = drawn(2, device)
    BAD[message](arguments)
    pools = [arguments[name].clone() for name in ("out_k", "out_v")]
    with pytest.raises(ValueError, match=f"^{message}"):
        compact_layers(**arguments)
    assert_identical([arguments[name] for name in ("out_k", "out_v")], pools)
