"""How compaction is launched: tiles, grids, no tensor made, nothing read; and clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kept import assert_out_of_place, random_case
from support import FRAME, Operators, Recorder, cumulative, other_constants

from vlcache_triton.kernels import compact
from vlcache_triton.kernels.compact import (
    COLUMN_BYTES,
    IN_PLACE_BYTES,
    TILE_BYTES,
    compact_kv,
    compact_kv_,
    tile_rows,
)

HALF, FLOAT = torch.float16, torch.float32
HEAD_SIZES = (1, 64, 80, 96, 128, 256, 576, 10**4)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_tiles_are_of_one_size(d: int, itemsize: int) -> None:
    """A power of two of rows, in the registers of four warps, whatever the head size."""
    rows = tile_rows(d, itemsize)
    assert rows >= 1
    assert rows & (rows - 1) == 0
    assert rows == 1 or rows * d * itemsize * 2 > TILE_BYTES // 2
    assert rows == 1 or rows * d * itemsize <= TILE_BYTES


def test_tiles_of_usual_heads() -> None:
    assert [tile_rows(d, 2) for d in (64, 80, 96, 128, 256)] == [64, 32, 32, 32, 16]
    assert [tile_rows(d, 4) for d in (64, 80, 96, 128, 256)] == [32, 16, 16, 16, 8]


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> tuple[Recorder, Recorder]:
    """The kernels replaced, out of place and in place, and tensors of any device let pass."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    recorders = Recorder(), Recorder()
    monkeypatch.setattr(compact, "_compact_kernel", recorders[0])
    monkeypatch.setattr(compact, "_compact_in_place_kernel", recorders[1])
    return recorders


def meta_arguments(
    rows: int, max_kept: int, dtype: torch.dtype = HALF, paged: bool = False, d: int = 64
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What compact_kv_ takes, and what compact_kv takes besides: 3 sequences of 2 heads."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def ints(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int32)

    shape, pool = ((rows, 16), (40, 16)) if paged else ((rows,), (640,))
    sources = dict(
        k=empty(*shape, 2, d),
        v=empty(*shape, 2, d),
        cu_seqlens_k=ints(4),
        indices=ints(6 * max_kept),
        cu_kept=ints(7),
        max_kept=max_kept,
        block_table=ints(3, 9) if paged else None,
    )
    target = dict(
        out_k=empty(*pool, 1, d),
        out_v=empty(*pool, 1, d),
        cu_seqlens_out=ints(7),
        out_block_table=ints(6, 9) if paged else None,
    )
    return sources, target


@pytest.mark.parametrize("paged", [False, True])
def test_the_host_reads_and_makes_nothing(recorders, paged: bool) -> None:
    """Tensors without values, on the device `meta`, do: no sync, no second copy of the cache."""
    sources, target = meta_arguments(2000, 777, paged=paged)
    with Operators() as operators:
        compact_kv(**sources, **target)
        compact_kv_(**sources)
    assert operators.names == []
    for recorder, tensors in zip(recorders, (sources | target, sources), strict=True):
        (arguments,) = recorder.arguments
        for name, x in tensors.items():
            if torch.is_tensor(x):
                assert arguments[f"{name}_ptr"] is x


@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_grids(recorders, d: int, dtype: torch.dtype) -> None:
    """Out of place by tiles of kept rows; in place by columns, as tiles have to wait."""
    out_of_place, in_place = recorders
    itemsize = torch.finfo(dtype).bits // 8
    for most in (1, 63, 64, 65, 2000):
        sources, target = meta_arguments(4000, most, dtype, d=d)
        compact_kv(**sources, **target)
        compact_kv_(**sources)
        assert out_of_place.grids[-1] == (6, -(-most // tile_rows(d, itemsize)), 1)
        assert in_place.grids[-1] == (6, 2 * -(-d * itemsize // 64))


@pytest.mark.parametrize(("multiprocessors", "column_bytes"), [(48, 64), (49, 32), (1000, 32)])
def test_few_segments_in_place_go_by_narrow_columns(
    recorders, monkeypatch, multiprocessors: int, column_bytes: int
) -> None:
    """6 segments of K and V, 4 columns of 64 bytes each, are 48 programs."""
    monkeypatch.setattr(compact, "num_multiprocessors", lambda _: multiprocessors)
    compact_kv_(**meta_arguments(4000, 2000, HALF, d=128)[0])
    assert column_bytes in COLUMN_BYTES
    assert recorders[1].grids == [(6, 2 * 256 // column_bytes)]
    constants = recorders[1].constants[0]
    assert constants["COLUMNS_K"] * 2 == constants["COLUMNS_V"] * 2 == column_bytes
    assert constants["ROWS"] * column_bytes == IN_PLACE_BYTES


def test_grids_of_a_million_tokens(recorders) -> None:
    """No axis but the first may pass 65,535."""
    sources, target = meta_arguments(2**20, 2**20, FLOAT, d=256)
    compact_kv(**sources, **target)
    compact_kv_(**sources)
    tiles = 2**20 // tile_rows(256, 4)
    assert tiles > 65535
    assert recorders[0].grids == [(6, tiles // 3 + 1, 3)]
    assert recorders[1].grids == [(6, 32)]


def test_tiles_along_two_axes(device: torch.device) -> None:
    with other_constants(compact, MAX_GRID=3, TILE_BYTES=8 * 64 * 2):
        assert_out_of_place(random_case([77, 9], [71, 8], num_kv_heads=1, device=device))


@pytest.mark.parametrize("paged", [False, True])
def test_lengths_compile_nothing_new(recorders, paged: bool) -> None:
    for rows, most in [(90, 20), (2000, 20), (2000, 1999), (131072, 10**5)]:
        sources, target = meta_arguments(rows, most, paged=paged)
        compact_kv(**sources, **target)
        compact_kv_(**sources)
    for recorder in recorders:
        assert recorder.constants[0]
        assert recorder.constants == [recorder.constants[0]] * 4


@pytest.mark.parametrize("most", [0, -1])
def test_nothing_to_move_launches_nothing(recorders, most: int) -> None:
    sources, target = meta_arguments(90, 0)
    compact_kv(**(sources | target | {"max_kept": most}))
    compact_kv_(**(sources | {"max_kept": most}))
    assert recorders[0].grids == recorders[1].grids == []


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def half(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(*shape, dtype=HALF, **options)


E5M2 = torch.float8_e5m2
BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "k: got shape .90, 2.,": (ValueError, dict(k=half(90, 2))),
    "k: got shape .90, 2, 64": (ValueError, dict(block_table=ints(1, 9))),
    "k: got dtype": (NotImplementedError, dict(k=half(90, 2, 64).to(E5M2))),
    "k: got stride 2": (ValueError, dict(k=half(90, 2, 128)[..., ::2])),
    "v: got device meta": (ValueError, dict(v=half(90, 2, 64, device="meta"))),
    "v: got shape .91": (ValueError, dict(v=half(91, 2, 64))),
    "v: got shape .90, 1, 64": (ValueError, dict(v=half(90, 1, 64))),
    "v: got shape .90, 64": (ValueError, dict(v=half(90, 64))),
    "v: got dtype": (NotImplementedError, dict(v=half(90, 2, 64).int())),
    "v: got stride 2": (ValueError, dict(v=half(90, 2, 128)[..., ::2])),
    "cu_seqlens_k: got no elements": (ValueError, dict(cu_seqlens_k=ints(0))),
    "cu_seqlens_k: got dtype": (ValueError, dict(cu_seqlens_k=ints(2).long())),
    "cu_seqlens_k: got strides": (ValueError, dict(cu_seqlens_k=ints(4)[::2])),
    "cu_seqlens_k: got None": (ValueError, dict(cu_seqlens_k=None)),
    "cu_kept: got shape .2,": (ValueError, dict(cu_kept=ints(2))),
    "cu_kept: got dtype": (ValueError, dict(cu_kept=ints(3).long())),
    "cu_kept: got strides": (ValueError, dict(cu_kept=ints(6)[::2])),
    "indices: got shape": (ValueError, dict(indices=ints(2, 21))),
    "indices: got dtype": (ValueError, dict(indices=ints(42).long())),
    "indices: got strides": (ValueError, dict(indices=ints(84)[::2])),
    "indices: got device meta": (ValueError, dict(indices=ints(42).to("meta"))),
    "block_table: got shape": (ValueError, dict(block_table=ints(3), paged=True)),
    "block_table: got dtype": (ValueError, dict(block_table=ints(1, 9).long(), paged=True)),
    "block_table: got strides": (ValueError, dict(block_table=ints(1, 9)[:, ::2], paged=True)),
}
BAD_OUT: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "out_k: got shape .50, 2, 64": (ValueError, dict(out_k=half(50, 2, 64))),
    "out_k: got shape .50, 1, 80": (ValueError, dict(out_k=half(50, 1, 80))),
    "out_k: got shape .50, 1, 64": (ValueError, dict(out_block_table=ints(2, 9))),
    "out_k: got dtype torch.float32": (ValueError, dict(out_k=half(50, 1, 64).float())),
    "out_k: got dtype torch.int32": (NotImplementedError, dict(out_k=half(50, 1, 64).int())),
    "out_k: got stride 2": (ValueError, dict(out_k=half(50, 1, 128)[..., ::2])),
    "out_v: got shape .49": (ValueError, dict(out_v=half(49, 1, 64))),
    "out_v: got shape .50, 1, 63": (ValueError, dict(out_v=half(50, 1, 63))),
    "out_v: got dtype": (ValueError, dict(out_v=half(50, 1, 64).bfloat16())),
    "out_v: got stride 2": (ValueError, dict(out_v=half(50, 1, 128)[..., ::2])),
    "out_v: got device meta": (ValueError, dict(out_v=half(50, 1, 64, device="meta"))),
    "cu_seqlens_out: got shape": (ValueError, dict(cu_seqlens_out=ints(2))),
    "cu_seqlens_out: got dtype": (ValueError, dict(cu_seqlens_out=ints(3).long())),
    "cu_seqlens_out: got None": (ValueError, dict(cu_seqlens_out=None)),
    "out_block_table: got shape .1, 9": (
        ValueError,
        dict(out_block_table=ints(1, 9), out_paged=True),
    ),
    "out_block_table: got dtype": (
        ValueError,
        dict(out_block_table=ints(2, 9).long(), out_paged=True),
    ),
}


def refused(device: torch.device, change: dict[str, Any]) -> dict[str, Any]:
    """The arguments of both functions with a change that one of them must refuse."""
    case, change = random_case([90], [20, 22], device=device), dict(change)
    out = [torch.full((50, 1, 64), FRAME, dtype=HALF, device=device) for _ in range(2)]
    arguments = dict(k=case.k, v=case.v, **case.selection)
    target = dict(out_k=out[0], out_v=out[1], cu_seqlens_out=cumulative([25, 25], device))
    if change.pop("paged", False):
        arguments |= dict(k=case.k[:, None], v=case.v[:, None])
    if change.pop("out_paged", False):
        target |= dict(out_k=out[0][:, None], out_v=out[1][:, None])
    moved = {
        k: x if x is None or x.device.type == "meta" else x.to(device) for k, x in change.items()
    }
    return arguments | target | moved


@pytest.mark.parametrize(("name", "error", "change"), [(k, *v) for k, v in (BAD | BAD_OUT).items()])
def test_refusals_name_the_argument(device, recorders, name: str, error, change) -> None:
    with pytest.raises(error, match=f"^{name}"):
        compact_kv(**refused(device, change))
    assert not recorders[0].grids


@pytest.mark.parametrize(("name", "error", "change"), [(k, *v) for k, v in BAD.items()])
def test_refusals_in_place(device, recorders, name: str, error, change) -> None:
    arguments = refused(device, change)
    shared = {k: v for k, v in arguments.items() if "out" not in k}
    with pytest.raises(error, match=f"^{name}"):
        compact_kv_(**shared)
    assert not recorders[1].grids


def test_what_is_refused_is_right_otherwise(device: torch.device, recorders) -> None:
    arguments = refused(device, {})
    compact_kv(**arguments)
    compact_kv_(**{k: v for k, v in arguments.items() if "out" not in k})
    assert (len(recorders[0].grids), len(recorders[1].grids)) == (1, 1)


def test_without_a_gpu_the_interpreter_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = random_case([90], [20, 22])
    with pytest.raises(ValueError, match=r"k: got device cpu, expected a CUDA device"):
        compact_kv_(case.k, case.v, **case.selection)
