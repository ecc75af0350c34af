"""What profilers are told: bytes and FLOPs by the live lengths, against numbers counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kept import random_case
from support import Recorder, cumulative, random_varlen

from vlcache_triton.kernels import (
    append,
    compact,
    decode,
    descales,
    key_value_stats,
    remainder,
    schedule,
    score,
    select,
)

KERNELS = {
    name: module
    for module in (
        *(append, compact, decode, descales, key_value_stats, remainder, schedule, score, select),
    )
    for name in vars(module)
    if name.endswith("_kernel")
}
LENGTHS, ROWS = [70, 0, 9], [2, 1, 1]
ROOM = [n + 7 for n in LENGTHS]  # of which the rest is not live
HEADS, KV_HEADS, D, D_V = 4, 2, 64, 32


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What each kernel would tell of its last launch, all of them replaced."""
    launched = {}
    for name, module in KERNELS.items():
        kernel, launched[name] = getattr(module, name), Recorder()
        options = getattr(kernel, "kwargs", None) or {"launch_metadata": kernel.launch_metadata}
        launched[name].tells = options["launch_metadata"]
        monkeypatch.setattr(module, name, launched[name])

    def told(name: str) -> dict[str, float]:
        recorder = launched.pop(name)
        return recorder.tells(recorder.grids[-1], None, recorder.arguments[-1])

    return told


def test_every_kernel_tells() -> None:
    assert len(KERNELS) == 18


@pytest.mark.parametrize("page_size", [None, 16])
def test_decode_by_a_schedule(device, told, monkeypatch, page_size: int | None) -> None:
    """70 keys are three blocks, which two programs share; nine are one, and another's."""
    for module in (decode, schedule):
        monkeypatch.setattr(module, "num_multiprocessors", lambda _: 2)  # two programs a KV head
    x = random_varlen(ROWS, ROOM, d=D, d_v=D_V, used=LENGTHS, page_size=page_size, device=device)
    lengths = (x.cu_seqlens_k[None], 2, x.max_seqlen_k)
    where = dict(seqused_k=x.seqused_k[None], block_table=x.block_table)
    table = schedule.decode_schedule(x.q, x.k, x.v, *lengths, **where)
    assert table.shape == (1, 3 + 1 + 2 + 1)
    assert told("_schedule_kernel") == {"bytes": 4 * (4 + 3 + table.numel())}
    table[0] = torch.tensor([0, 3, 3, 4, 0, 0, 3])
    arguments = (x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, 2, x.max_seqlen_k)
    decode.varlen_decode(*arguments, schedule=table[0], causal=True, **x.cache)
    size = x.q.element_size()
    pieces = 2 * 2 * HEADS * (D_V + 1) * 4
    keys = 79 * KV_HEADS * (D + D_V) * size
    assert told("_scheduled_kernel") == {
        "bytes": x.q.numel() * size + keys + pieces,
        "flops16": 2.0 * (70 * 2 + 9) * HEADS * (D + D_V),
    }
    out = 4 * HEADS * D_V * size
    assert told("_combine_pieces_kernel") == {"bytes": pieces + out}


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("window", [-1, 5])
def test_decode(device, told, monkeypatch, page_size: int | None, window: int) -> None:
    monkeypatch.setattr(decode, "num_multiprocessors", lambda _: 9)  # splits of 32 keys
    x = random_varlen(ROWS, ROOM, d=D, d_v=D_V, used=LENGTHS, page_size=page_size, device=device)
    arguments = (x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, 2, x.max_seqlen_k)
    decode.varlen_decode(*arguments, window_size=(window, -1), causal=True, **x.cache)
    keys = LENGTHS if window < 0 else [7, 0, 6]  # window + rows
    size = x.q.element_size()
    split = (3 * 2 + 1) * HEADS * (D_V + 1) * 4  # 70 keys are three splits, of which two rows
    assert told("_split_kernel") == {
        "bytes": x.q.numel() * size + sum(keys) * KV_HEADS * (D + D_V) * size + split,
        f"flops{8 * size}": 2 * (keys[0] * 2 + keys[2]) * HEADS * (D + D_V),
    }
    out = sum(ROWS) * HEADS * D_V * size
    assert told("_combine_splits_kernel") == {"bytes": split + out}


def test_direct_decode_writes_its_rows(device, told) -> None:
    x = random_varlen([1], [9], device=device)
    decode.varlen_decode(x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, 1, 9)
    size = x.q.element_size()
    moved = (2 * HEADS * D + 9 * KV_HEADS * 2 * D) * size
    assert told("_split_kernel")["bytes"] == moved


@pytest.mark.parametrize("page_size", [None, 16])
def test_scores(device, told, page_size: int | None) -> None:
    x = random_varlen(ROWS, ROOM, d=D, used=LENGTHS, page_size=page_size, device=device)
    arguments = (x.q, x.k, x.cu_seqlens_q, x.cu_seqlens_k, 2, x.max_seqlen_k)
    score.post_vision_stats(*arguments, **x.cache)
    size, num_rows = x.q.element_size(), sum(ROWS) * HEADS
    read = x.q.numel() * size + sum(LENGTHS) * KV_HEADS * D * size
    products = {f"flops{8 * size}": 2 * (70 * 2 + 9) * HEADS * D}
    rows, combined = told("_row_kernel"), told("_row_stats_kernel")
    partials = rows["bytes"] - read
    assert partials > 0
    assert partials % (2 * num_rows * 4) == 0  # a maximum and a sum for each split
    assert rows == {"bytes": read + partials, **products}
    assert combined == {"bytes": partials + 2 * num_rows * 4}
    columns = read + 2 * num_rows * 4 + sum(LENGTHS) * KV_HEADS * 4
    assert told("_column_kernel") == {"bytes": columns, **products}


def test_selection(device, told) -> None:
    scores = torch.zeros(3, KV_HEADS, 79, device=device)
    keep = torch.tensor([[5, 5, 20]] * 3, dtype=torch.int32, device=device)  # of 70, 0 and 9
    select.select_tokens(scores, cumulative(LENGTHS, device), keep, keep, max_seqlen=70)
    assert told("_select_kernel") == {"bytes": 4 * 3 * KV_HEADS * (79 + 5 + 9)}


def test_compaction_and_what_it_leaves_out(device, told) -> None:
    case = random_case([70, 9], [20, 22, 0, 3], d_v=D_V, before=4, device=device)
    size, kept, rows = case.k.element_size(), 45, 2 * 79
    compact.compact_kv_(case.k, case.v, **case.selection)
    moved = {"bytes": kept * (2 * (D + D_V) * size + 4)}
    assert told("_compact_in_place_kernel") == moved
    pool = [torch.zeros(200, 1, d, dtype=case.k.dtype, device=device) for d in (D, D_V)]
    starts = cumulative([50] * 4, device)
    compact.compact_kv(
        case.k, case.v, **case.selection, out_k=pool[0], out_v=pool[1], cu_seqlens_out=starts
    )
    assert told("_compact_kernel") == moved
    selection = {k: v for k, v in case.selection.items() if k != "max_kept"}
    sums = remainder.sum_evicted(case.k, case.v, **selection, max_seqlen_k=70)
    of_sums = 4 * sum(x.numel() for x in sums)
    evicted = (rows - kept) * (D + D_V) * size
    assert told("_sum_evicted_kernel") == {"bytes": evicted + 4 * kept + of_sums}
    counts = torch.tensor([50, 48, 9, 0], dtype=torch.int32, device=device)
    remainder.store_means(*sums, counts, *pool, starts)
    assert told("_store_means_kernel") == {"bytes": of_sums + 3 * (D + D_V) * size}


@pytest.mark.parametrize("page_size", [None, 16])
def test_keys_and_values(device, told, page_size: int | None) -> None:
    x = random_varlen(ROWS, ROOM, d=D, d_v=D_V, used=LENGTHS, page_size=page_size, device=device)
    arguments = (x.k, x.v, x.cu_seqlens_k, x.max_seqlen_k)
    key_value_stats.key_value_stats(*arguments, **x.cache)
    size, rows, segments = x.k.element_size(), sum(LENGTHS) * KV_HEADS, 3 * KV_HEADS
    sums, means = 4 * segments * D, 4 * segments * (D + 1)
    assert told("_sum_kernel") == {"bytes": rows * ((D + D_V) * size + 4) + sums}
    assert told("_mean_kernel") == {"bytes": sums + means}
    assert told("_cosine_kernel") == {"bytes": rows * (D * size + 4) + means}


def test_append(device, told) -> None:
    new = torch.zeros(2, 3, KV_HEADS, D, device=device)
    cache, used = torch.zeros(20, KV_HEADS, D, device=device), cumulative([1], device)
    append.append_kv(new, new, cache, cache, cumulative([10, 10], device), used)
    assert told("_append_kernel") == {"bytes": 2 * 2 * new.numel() * 4}


def test_fp8(device, told) -> None:
    """A byte an element, and scales; what becomes fp8 is read in its own dtype."""
    case = random_case([70, 9], [20, 22, 0, 3], d_v=D_V, before=4, device=device)
    size, kept, fp8 = case.k.element_size(), 45, torch.float8_e4m3fn
    selection = {k: v for k, v in case.selection.items() if k != "cu_seqlens_k"}
    counts = selection | {"cu_kept": case.cu_kept, "indices": case.indices}
    scales = descales.kept_descales([case.k], [case.v], case.cu_seqlens_k, **counts)
    rows = kept * (D + D_V)
    assert told("_kept_amax_kernel") == {"bytes": rows * size + 4 * kept + 2 * 4 * 4}
    given = {"k_descale": scales[0][0], "v_descale": scales[1][0]}
    pool = [torch.zeros(200, 1, d, device=device).to(fp8) for d in (D, D_V)]
    out = dict(out_k=pool[0], out_v=pool[1], cu_seqlens_out=cumulative([50] * 4, device))
    compact.compact_kv(case.k, case.v, **case.selection, **out, **given)
    assert told("_compact_kernel") == {"bytes": rows * (size + 1) + 4 * kept + 2 * 4 * 4}
    new = torch.zeros(2, 3, KV_HEADS, D, device=device)
    cache, used = torch.zeros(20, KV_HEADS, D, device=device).to(fp8), cumulative([1], device)
    given = {name: x.view(2, 2) for name, x in given.items()}
    append.append_kv(new, new, cache, cache, cumulative([10, 10], device), used, **given)
    assert told("_append_kernel") == {"bytes": 2 * new.numel() * (4 + 1) + 2 * 4 * 4}
    q = torch.zeros(2, HEADS, D, dtype=torch.float16, device=device)
    starts = cumulative([1, 1], device), cumulative([9, 9], device)
    decode.varlen_decode(q, cache, cache, *starts, 1, 9, **given)
    keys = 18 * KV_HEADS * 2 * D
    assert told("_split_kernel")["bytes"] == 2 * q.numel() * 2 + keys + 2 * 4 * 4


def test_nothing_is_read_while_a_graph_is_captured(device, told, monkeypatch) -> None:
    x = random_varlen([1], [9], device=device)
    decode.varlen_decode(x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, 1, 9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert told("_split_kernel") == {}
