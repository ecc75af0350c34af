"""The launch of a decode, a pure function; and what the host does: no reading, clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Operators, Recorder, cumulative, random_varlen

from vlcache_triton.kernels import append, decode
from vlcache_triton.kernels.append import append_kv
from vlcache_triton.kernels.decode import (
    MAX_SEQLEN_Q,
    DecodeLaunch,
    decode_launch,
    decode_workspace,
    varlen_decode,
)
from vlcache_triton.kernels.launch import padded

H100 = 132  # multiprocessors
LENGTHS = (0, 1, 63, 64, 65, 111, 2000, 2048, 32768, 131072, 10**6, 2**31 - 1)
HEAD_SIZES = (8, 64, 80, 96, 128, 256)


def launch(
    n: int = 32768,
    *,
    d: int = 128,
    itemsize: int = 2,
    group: int = 4,
    heads: int = 8,
    seqs: int = 1,
    n_q: int = 1,
    multiprocessors: int = H100,
) -> DecodeLaunch:
    return decode_launch(d, itemsize, group, heads, seqs, n_q, n, multiprocessors)


def compiled(x: DecodeLaunch) -> tuple[int | bool, ...]:
    """What makes Triton compile anew: all that is constexpr, and DIRECT."""
    return x.BLOCK_M, x.BLOCK_N, x.num_warps, x.num_stages, x.num_splits == 1


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_lengths_compile_direct_and_split_alone(d: int, itemsize: int) -> None:
    for n_q in (1, 5, 16):
        lengths = (*range(0, 9999, 37), *LENGTHS)
        variants = {compiled(launch(n, d=d, itemsize=itemsize, n_q=n_q)) for n in lengths}
        assert len(variants) == 2
        assert len({variant[:-1] for variant in variants}) == 1
    rows = {launch(d=d, itemsize=itemsize, n_q=n_q, group=7).BLOCK_M for n_q in range(1, 17)}
    assert len(rows) <= 3


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("seqs", [1, 64])
@pytest.mark.parametrize("multiprocessors", [1, H100])
def test_splits_cover_the_keys_once(n: int, seqs: int, multiprocessors: int) -> None:
    for itemsize in (2, 4):
        x = launch(n, seqs=seqs, itemsize=itemsize, multiprocessors=multiprocessors)
        assert x.num_splits >= 1
        assert x.split_size % x.BLOCK_N == 0  # so that blocks of keys start where splits do
        assert (x.num_splits - 1) * x.split_size < max(n, 1) <= x.num_splits * x.split_size
        assert x.num_splits * x.split_size < 2**31 + 64 * x.BLOCK_M  # keys are numbered in int32


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16, 71])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_row_blocks_cover_the_rows_once(group: int, itemsize: int) -> None:
    for d in HEAD_SIZES:
        for n_q in range(1, MAX_SEQLEN_Q + 1):
            x = launch(d=d, itemsize=itemsize, group=group, n_q=n_q)
            for block in (x.BLOCK_M, x.BLOCK_N):
                assert block >= 16
                assert block & (block - 1) == 0
            assert (x.num_row_blocks - 1) * x.BLOCK_M < n_q * group <= x.num_row_blocks * x.BLOCK_M


def test_one_token_of_a_group_is_one_row_block() -> None:
    """K and V are read once."""
    for d in HEAD_SIZES:
        for group in range(1, 17):
            assert launch(d=d, group=group).num_row_blocks == 1


@pytest.mark.parametrize("n", [32768, 131072])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_one_prompt_fills_the_gpu(n: int, itemsize: int) -> None:
    assert 0.9 * 2 * H100 <= launch(n, itemsize=itemsize).num_splits * 8 <= 1.1 * 2 * H100


def test_short_caches_are_split_until_splits_are_short() -> None:
    """After compression 1K tokens a head are the common case: 256 programs, not 8."""
    assert launch(1024).num_splits * 8 >= 0.9 * 2 * H100
    assert launch(1024).split_size == launch(1).split_size


def test_batches_need_few_splits() -> None:
    assert launch(1024, seqs=256).num_splits == 1
    assert launch(2048, seqs=64).num_splits == 1
    assert launch(8192, seqs=16).num_splits == 2


@pytest.mark.parametrize(("d", "n_q"), [(64, 1), (128, 16)])
def test_partial_results_are_small_beside_the_keys(d: int, n_q: int) -> None:
    for n in LENGTHS:
        for seqs in (1, 16, 256):
            x = launch(n, d=d, seqs=seqs, n_q=n_q)
            assert x.split_size >= 4 * min(n_q * 4, x.BLOCK_M)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_shared_memory_fits_small_gpus(d: int, itemsize: int) -> None:
    """99 KiB is what a block may have on sm_86 and sm_89; q, weights and all but one stage of K
    and V are what the compiled kernel holds there (tests/aot)."""
    for n_q in (1, 4, 16):
        x = launch(d=d, itemsize=itemsize, n_q=n_q, group=8)
        keys = (x.num_stages - 1) * x.BLOCK_N * 2 * padded(d)
        values = x.BLOCK_M * padded(d) + keys + x.BLOCK_M * x.BLOCK_N
        assert values * itemsize <= 99 * 1024


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("num_splits", [1, 2, 7, 1000])
def test_a_number_of_splits_is_kept_to(n: int, num_splits: int) -> None:
    """Whatever the heuristic would do; fewer only where blocks of keys do not go round."""
    x = decode_launch(128, 2, 4, 8, 64, 16, n, H100, num_splits)
    assert 1 <= x.num_splits <= num_splits
    assert (x.num_splits - 1) * x.split_size < max(n, 1) <= x.num_splits * x.split_size
    blocks = -(-n // x.BLOCK_N)
    assert x.num_splits == max(-(-blocks // -(-max(blocks, 1) // num_splits)), 1)
    assert x[:6] == decode_launch(128, 2, 4, 8, 64, 16, n, H100)[:6]


def test_nothing_to_do_is_a_launch_too() -> None:
    assert launch(0, n_q=0).num_row_blocks == 0
    assert launch(0, seqs=0).num_splits == 1
    assert launch(0).num_row_blocks == 1  # writes the rows that see no key


def test_workspace_holds_a_row_and_its_lse_a_split(device: torch.device) -> None:
    batch = random_varlen([3, 1], [2000, 63], d=80, d_v=48, device=device)
    x = decode._launch_for(batch.q, batch.v, 2, 3, 2000, decode.num_multiprocessors(device))
    workspace = decode_workspace(batch.q, batch.v, 2, 3, 2000)
    assert workspace.numel() == x.num_splits * 4 * 4 * 49
    assert x.num_splits > 1
    assert workspace.dtype == torch.float32
    assert decode_workspace(batch.q, batch.v, 2, 3, 30).numel() == 0
    assert decode_workspace(batch.q, batch.v, 2, 3, 2000, num_splits=1).numel() == 0
    assert decode_workspace(batch.q, batch.v, 2, 3, 2000, num_splits=7).numel() == 7 * 16 * 49


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """The kernels replaced, and tensors of any device let pass."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    recorders = {}
    for module, name in (
        (decode, "_split_kernel"),
        (decode, "_combine_splits_kernel"),
        (append, "_append_kernel"),
    ):
        recorders[name] = Recorder()
        monkeypatch.setattr(module, name, recorders[name])
    return recorders


@pytest.mark.parametrize("page_size", [None, 16])
def test_the_host_reads_and_allocates_nothing(
    recorders, monkeypatch: pytest.MonkeyPatch, page_size: int | None
) -> None:
    """Tensors without values, on the device `meta`, do: a step may be captured in a CUDA graph."""
    monkeypatch.setattr(decode, "num_multiprocessors", lambda _: 10)

    def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def ints(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int32)

    rows = (640,) if page_size is None else (40, page_size)
    q, k, v, new = empty(5, 8, 64), empty(*rows, 2, 64), empty(*rows, 2, 64), empty(5, 1, 2, 64)
    table = None if page_size is None else ints(5, 10)
    workspace, starts, used = decode_workspace(q, v, 5, 1, 2000), ints(6), ints(5)
    starts_k, sinks = (starts if page_size is None else None), empty(8)
    with Operators() as operators:
        append_kv(new, new, k, v, starts_k, used, block_table=table)
        out = varlen_decode(
            *(q, k, v, starts, starts_k, 1, 2000),
            seqused_k=used,
            block_table=table,
            sinks=sinks,
            out=q,
            workspace=workspace,
        )
    assert out is q
    assert set(operators.names) <= {"slice.Tensor"}
    assert recorders["_append_kernel"].grids == [(5,)]
    assert recorders["_split_kernel"].grids == [(5 * 2, 2)]
    assert recorders["_combine_splits_kernel"].grids == [(5 * 8, 1)]
    assert recorders["_split_kernel"].arguments[0]["sinks_ptr"] is None  # once, not in every split


HALF = torch.float16
E5M2 = torch.float8_e5m2
BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "q: got shape": (ValueError, dict(q=torch.zeros(2, 64).half())),
    "q: got dtype": (NotImplementedError, dict(q=torch.zeros(2, 4, 64).to(E5M2))),
    "q: got stride": (ValueError, dict(q=torch.zeros(2, 4, 128).half()[..., ::2])),
    "k: got shape": (ValueError, dict(k=torch.zeros(1, 200, 2, 64).half())),
    "k: got dtype torch.float32": (ValueError, dict(k=torch.zeros(200, 2, 64))),
    "k: got dtype torch.float8": (
        NotImplementedError,
        dict(k=torch.zeros(200, 2, 64).to(E5M2)),
    ),
    "k: got stride": (ValueError, dict(k=torch.zeros(200, 2, 128).half()[..., ::2])),
    "k: got head size 32": (ValueError, dict(k=torch.zeros(200, 2, 32).half())),
    "k: got head size 257": (
        NotImplementedError,
        dict(q=torch.zeros(2, 4, 257).half(), k=torch.zeros(200, 2, 257).half()),
    ),
    "k: got 3 heads": (
        ValueError,
        dict(k=torch.zeros(200, 3, 64).half(), v=torch.zeros(200, 3, 64).half()),
    ),
    "k: got 0 heads": (
        ValueError,
        dict(k=torch.zeros(200, 0, 64).half(), v=torch.zeros(200, 0, 64).half()),
    ),
    "v: got shape .199": (ValueError, dict(v=torch.zeros(199, 2, 64).half())),
    "v: got shape .200, 64": (ValueError, dict(v=torch.zeros(200, 64).half())),
    "v: got dtype": (ValueError, dict(v=torch.zeros(200, 2, 64).bfloat16())),
    "v: got stride": (ValueError, dict(v=torch.zeros(200, 2, 128).half()[..., ::2])),
    "v: got head size": (NotImplementedError, dict(v=torch.zeros(200, 2, 257).half())),
    "cu_seqlens_q: got dtype": (ValueError, dict(cu_seqlens_q=torch.tensor([0, 2]))),
    "cu_seqlens_q: got no": (ValueError, dict(cu_seqlens_q=torch.zeros(0).int())),
    "cu_seqlens_k: got shape": (ValueError, dict(cu_seqlens_k=cumulative([100, 100]))),
    "cu_seqlens_k: got strides": (ValueError, dict(cu_seqlens_k=torch.zeros(4).int()[::2])),
    "max_seqlen_q": (NotImplementedError, dict(max_seqlen_q=MAX_SEQLEN_Q + 1)),
    "window_size": (ValueError, dict(window_size=(1, 2, 3))),
    "first_key_bias: got dtype": (ValueError, dict(first_key_bias=torch.zeros(2).half())),
    "first_key_bias: got shape": (ValueError, dict(first_key_bias=torch.zeros(3))),
    "window_size: got .9, -1., expected no left bound": (
        ValueError,
        dict(first_key_bias=torch.zeros(2), window_size=(9, -1)),
    ),
    "sinks: got dtype": (NotImplementedError, dict(sinks=torch.zeros(4).int())),
    "sinks: got shape ..,": (ValueError, dict(sinks=torch.zeros(()))),
    "sinks: got shape .3,": (ValueError, dict(sinks=torch.zeros(3))),
    "sinks: got shape .1, 1, 4": (ValueError, dict(sinks=torch.zeros(1, 1, 4))),
    "sinks: got shape .2, 4": (ValueError, dict(sinks=torch.zeros(2, 4))),
    "sinks: got shape .0, 4": (ValueError, dict(sinks=torch.zeros(0, 4))),
    "sinks: got stride 2": (ValueError, dict(sinks=torch.zeros(8)[::2])),
    "sinks: got device meta": (ValueError, dict(sinks=torch.zeros(4, device="meta"))),
    "num_splits: got -1": (ValueError, dict(num_splits=-1)),
    "num_splits: got 2, expected 0 together with": (
        ValueError,
        dict(num_splits=2, schedule=torch.zeros(9).int()),
    ),
    "cu_seqlens_k: got None, expected starts, or block_table and seqused_k": (
        ValueError,
        dict(cu_seqlens_k=None, seqused_k=torch.tensor([1]).int()),
    ),
    "cu_seqlens_k: got None, expected starts, or": (
        ValueError,
        dict(cu_seqlens_k=None, block_table=torch.zeros(1, 9).int(), paged=True),
    ),
    "seqused_k: got shape": (ValueError, dict(seqused_k=torch.tensor([1, 2]).int())),
    "seqused_k: got dtype": (ValueError, dict(seqused_k=torch.tensor([1]))),
    "block_table: got shape": (ValueError, dict(block_table=torch.zeros(2, 9).int(), paged=True)),
    "block_table: got dtype": (ValueError, dict(block_table=torch.zeros(1, 9), paged=True)),
    "out: got shape": (ValueError, dict(out=torch.zeros(2, 4, 32).half())),
    "out: got dtype": (ValueError, dict(out=torch.zeros(2, 4, 64))),
    "out: got stride": (ValueError, dict(out=torch.zeros(2, 4, 128).half()[..., ::2])),
    "workspace: got dtype": (ValueError, dict(workspace=torch.zeros(9999).half())),
    "workspace: got dtype torch.int32": (
        ValueError,
        dict(workspace=torch.zeros(9999).int(), max_seqlen_k=1),
    ),
    "workspace: got shape .9,": (ValueError, dict(workspace=torch.zeros(9))),
    "workspace: got shape .9, 9999": (ValueError, dict(workspace=torch.zeros(9, 9999))),
    "workspace: .* strides .2,": (ValueError, dict(workspace=torch.zeros(9999)[::2])),
    "k: got device meta": (ValueError, dict(k=torch.zeros(200, 2, 64, device="meta"))),
}


def moved(change: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        k: v.to(device) if torch.is_tensor(v) and v.device.type != "meta" else v
        for k, v in change.items()
    }


@pytest.mark.parametrize(("name", "error", "change"), [(k, *v) for k, v in BAD.items()])
def test_refusals_name_the_argument(device, recorders, name: str, error, change) -> None:
    batch = random_varlen([2], [200], device=device)
    arguments: dict[str, Any] = dict(
        q=batch.q,
        k=batch.k,
        v=batch.v,
        cu_seqlens_q=batch.cu_seqlens_q,
        cu_seqlens_k=batch.cu_seqlens_k,
        max_seqlen_q=2,
        max_seqlen_k=200,
    )
    change = dict(change)
    if change.pop("paged", False):
        arguments |= dict(k=batch.k[:, None], v=batch.v[:, None])
    with pytest.raises(error, match=f"^{name}"):
        varlen_decode(**(arguments | moved(change, device)))
    assert not recorders["_split_kernel"].grids


BAD_APPEND: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "k: got shape": (ValueError, dict(k=torch.zeros(1, 2, 64).half())),
    "k: got dtype": (NotImplementedError, dict(k=torch.zeros(1, 3, 2, 64).to(E5M2))),
    "k: got stride": (ValueError, dict(k=torch.zeros(1, 3, 2, 128).half()[..., ::2])),
    "v: got shape": (ValueError, dict(v=torch.zeros(1, 4, 2, 64).half())),
    "v: got stride": (ValueError, dict(v=torch.zeros(1, 3, 2, 128).half()[..., ::2])),
    "k_cache: got shape .1, 9, 2": (ValueError, dict(k_cache=torch.zeros(1, 9, 2, 64).half())),
    "k_cache: got shape .9, 1": (ValueError, dict(k_cache=torch.zeros(9, 1, 64).half())),
    "k_cache: got shape .9, 2, 80": (ValueError, dict(k_cache=torch.zeros(9, 2, 80).half())),
    "k_cache: got dtype torch.float32": (ValueError, dict(k_cache=torch.zeros(9, 2, 64))),
    "k_cache: got dtype torch.float8": (
        NotImplementedError,
        dict(k_cache=torch.zeros(9, 2, 64).to(E5M2)),
    ),
    "k_cache: got stride": (ValueError, dict(k_cache=torch.zeros(9, 2, 128).half()[..., ::2])),
    "v_cache: got stride": (ValueError, dict(v_cache=torch.zeros(9, 2, 128).half()[..., ::2])),
    "v_cache: got shape .8, 2, 64": (ValueError, dict(v_cache=torch.zeros(8, 2, 64).half())),
    "v_cache: got dtype": (ValueError, dict(v_cache=torch.zeros(9, 2, 64).bfloat16())),
    "cu_seqlens_k: got shape": (ValueError, dict(cu_seqlens_k=cumulative([4, 5]))),
    "cu_seqlens_k: got dtype": (ValueError, dict(cu_seqlens_k=torch.tensor([0, 9]))),
    "cu_seqlens_k: got None": (ValueError, dict(cu_seqlens_k=None)),
    "seqused_k: got shape": (ValueError, dict(seqused_k=torch.zeros(2).int())),
    "seqused_k: got dtype": (ValueError, dict(seqused_k=torch.zeros(1).long())),
    "block_table: got shape": (ValueError, dict(block_table=torch.zeros(2, 9).int(), paged=True)),
    "block_table: got dtype": (ValueError, dict(block_table=torch.zeros(1, 9), paged=True)),
    "seqused_k: got device": (ValueError, dict(seqused_k=torch.zeros(1, device="meta").int())),
}


@pytest.mark.parametrize(("name", "error", "change"), [(k, *v) for k, v in BAD_APPEND.items()])
def test_append_refusals_name_the_argument(device, recorders, name: str, error, change) -> None:
    floats: dict[str, Any] = dict(
        k=torch.zeros(1, 3, 2, 64, dtype=HALF, device=device),
        v=torch.zeros(1, 3, 2, 64, dtype=HALF, device=device),
        k_cache=torch.zeros(9, 2, 64, dtype=HALF, device=device),
        v_cache=torch.zeros(9, 2, 64, dtype=HALF, device=device),
        cu_seqlens_k=cumulative([9], device),
        seqused_k=torch.tensor([4], dtype=torch.int32, device=device),
    )
    change = dict(change)
    if change.pop("paged", False):
        floats |= dict(k_cache=floats["k_cache"][:, None], v_cache=floats["v_cache"][:, None])
    with pytest.raises(error, match=f"^{name}"):
        append_kv(**(floats | moved(change, device)))
    assert not recorders["_append_kernel"].grids
    assert floats["seqused_k"].tolist() == [4]


def test_without_a_gpu_the_interpreter_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    batch = random_varlen([1], [9])
    with pytest.raises(ValueError, match=r"q: got device cpu, expected a CUDA device"):
        varlen_decode(batch.q, batch.k, batch.v, batch.cu_seqlens_q, batch.cu_seqlens_k, 1, 9)
