"""The live keys cut evenly on the device: the table, and decoding by it.

Few programs and many, so that one has several sequences, and a sequence several of them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    MEANT_INFINITIES,
    Operators,
    Recorder,
    Varlen,
    assert_decode_accurate,
    assert_identical,
    cumulative,
    random_varlen,
    run_decode,
)

from vlcache_triton.kernels import append, decode, schedule
from vlcache_triton.kernels.decode import (
    decode_launch,
    decode_workspace,
    schedule_launch,
    varlen_decode,
)
from vlcache_triton.kernels.schedule import decode_schedule

pytestmark = [
    *MEANT_INFINITIES,
    pytest.mark.skipif(not schedule.IS_SUPPORTED, reason="needs Triton 3.5"),
]
FLOAT = torch.float32
ONE_HEAD: dict[str, Any] = dict(num_kv_heads=1, d=16, dtype=FLOAT)
SMALL = ONE_HEAD | dict(num_heads=2)


@pytest.fixture
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says how many there are; two programs on each."""

    def set_to(n: int) -> None:
        for module in (decode, schedule):
            monkeypatch.setattr(module, "num_multiprocessors", lambda _: n)

    return set_to


def make_schedule(batch: Varlen, **options: Any) -> torch.Tensor:
    """`[1, n]`, of a batch as the only layer."""
    used = None if batch.seqused_k is None else batch.seqused_k[None]
    lengths = (batch.cu_seqlens_k[None], batch.max_seqlen_q, batch.max_seqlen_k)
    more = dict(seqused_k=used, block_table=batch.block_table) | options
    return decode_schedule(batch.q, batch.k, batch.v, *lengths, **more)


def scheduled(batch: Varlen, **options: Any) -> Any:
    return run_decode(varlen_decode, batch, schedule=make_schedule(batch)[0], **options)


def expected_table(lengths: list[int], block: int, num_programs: int, min_share: int) -> list[int]:
    """The table of one layer, counted block by block."""
    blocks = [-(-max(n, 0) // block) for n in lengths]
    owners = [i for i, n in enumerate(blocks) for _ in range(n)]
    starts = [0, *accumulate(blocks)]
    share = max(-(-len(owners) // num_programs), min_share)
    first = []
    for p in range(num_programs + 1):
        is_inside = p < num_programs and p * share < len(owners)
        first.append(owners[p * share] if is_inside else len(lengths))
    return starts + first


@given(
    layers=st.integers(1, 3),
    num_seqs=st.integers(1, 20),
    n=st.integers(1, 9),
    num_new=st.sampled_from([0, 1, 40]),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_the_table(layers: int, num_seqs: int, n: int, num_new: int, data: Any) -> None:
    """Of several layers at once; full segments stay full."""
    size = st.one_of(st.just(0), st.integers(0, 200), st.integers(0, 3))
    used = data.draw(st.lists(size, min_size=layers * num_seqs, max_size=layers * num_seqs))
    room = [used[i] + i % 50 for i in range(len(used))]
    q, k = torch.zeros(num_seqs, 2, 16), torch.zeros(max(sum(room), 1), 1, 16)
    capacities = torch.tensor(room).view(layers, num_seqs)
    starts = torch.stack([cumulative(row) for row in capacities.tolist()])
    live = torch.tensor(used, dtype=torch.int32).view(layers, num_seqs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "num_multiprocessors", lambda _: n)
        table = decode_schedule(q, k, k, starts, 1, 250, seqused_k=live, num_new=num_new)
    plan = decode_launch(16, 4, 2, 1, num_seqs, 1, 250, n)
    cut = schedule_launch(plan, 2, 1, num_seqs, 250, n)
    assert table.shape == (layers, num_seqs + cut.num_programs + 2)
    for row, lengths in zip(table, (live + num_new).minimum(capacities), strict=True):
        assert row.tolist() == expected_table(lengths.tolist(), plan.BLOCK_N, *cut)


@pytest.mark.parametrize("page_size", [None, 16])
def test_no_length_is_believed_beyond_its_memory(device, page_size: int | None) -> None:
    batch = random_varlen([1, 1], [48, 160], used=[48, 90], page_size=page_size, **SMALL)
    expected = make_schedule(batch)
    batch.seqused_k = torch.tensor([48, -5], dtype=torch.int32)
    assert make_schedule(batch)[0, :3].tolist() == [0, 2, 2]
    batch.seqused_k = torch.tensor([48, 10**9], dtype=torch.int32)
    assert make_schedule(batch)[0, :3].tolist() == [0, 2, 7]
    assert expected[0, :3].tolist() == [0, 2, 5]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one key": (dict(lengths_q=[1], lengths_k=[1]), {}),
    "nothing": (dict(lengths_q=[1, 2], lengths_k=[5, 9], used=[0, 0]), {}),
    "no sequences": (dict(lengths_q=[], lengths_k=[]), {}),
    "empty ones": (dict(lengths_q=[0, 3, 4, 0, 1], lengths_k=[7, 0, 40, 0, 90], dtype=FLOAT), {}),
    "odd": (dict(lengths_q=[1, 5, 1], lengths_k=[133, 63, 111], num_heads=14, d=80, d_v=64), {}),
    "group 1": (dict(lengths_q=[1, 1], lengths_k=[111, 600], num_kv_heads=4), {}),
    "group 8": (dict(lengths_q=[1, 2], lengths_k=[500, 63], num_heads=8, num_kv_heads=1), {}),
    "d 256": (dict(lengths_q=[1, 1], lengths_k=[200, 63], d=256), {}),
    "d 128": (dict(lengths_q=[16, 1], lengths_k=[111, 63], num_heads=8, d=128), {}),
    "pages": (
        dict(lengths_q=[3, 1, 1], lengths_k=[90, 300, 7], used=[80, 290, 7], page_size=16),
        {},
    ),
    "page 1": (dict(lengths_q=[1, 1], lengths_k=[90, 200], page_size=1), {}),
    "window": (dict(lengths_q=[2, 3], lengths_k=[333, 90]), dict(window_size=(40, 0))),
    "not causal": (dict(lengths_q=[2, 3], lengths_k=[150, 63]), dict(causal=False)),
    "softcap": (
        dict(lengths_q=[2, 1], lengths_k=[150, 63]),
        dict(softcap=3.0, softmax_scale=0.3),
    ),
}


@pytest.mark.parametrize("n", [2, 40])
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference_and_twice_the_same(device, multiprocessors, name, n) -> None:
    shapes, options = CASES[name]
    multiprocessors(n)
    batch = random_varlen(**shapes, device=device)
    actual = scheduled(batch, **options)
    assert_decode_accurate(actual, batch, **options)
    assert_identical(scheduled(batch, **options), actual)


@pytest.mark.parametrize("n", [2, 50])
def test_a_row_for_what_is_evicted(device, multiprocessors, n: int) -> None:
    multiprocessors(n)
    batch = random_varlen([1, 1, 1], [300, 1, 90], device=device)
    bias = torch.linspace(0, 6, 6, device=device)
    assert_decode_accurate(scheduled(batch, first_key_bias=bias), batch, first_key_bias=bias)


@pytest.mark.parametrize(("num_seqs", "n"), [(1, 40), (31, 3), (31, 30), (90, 8)])
def test_many_sequences_of_unequal_length(device, multiprocessors, num_seqs: int, n: int) -> None:
    """Some empty, one long; what a program has of one may end anywhere."""
    multiprocessors(n)
    used = [(37 * i) % 50 for i in range(num_seqs)]
    used[num_seqs // 2] = 1500
    capacities = [x + i % 3 for i, x in enumerate(used)]
    batch = random_varlen([1] * num_seqs, capacities, used=used, device=device, **SMALL)
    actual = scheduled(batch)
    assert_decode_accurate(actual, batch)
    assert_identical(scheduled(batch), actual)


def test_the_table_of_4096_segments(device, multiprocessors) -> None:
    multiprocessors(20)
    used = [(37 * i) % 130 for i in range(4096)]
    batch = random_varlen([1] * 4096, used, used=used, device=device, num_heads=1, **ONE_HEAD)
    (table,) = make_schedule(batch)
    cut = len(table) - 4096 - 2, 1
    assert table.tolist() == expected_table(used, 32, *cut)


@pytest.mark.parametrize("num_seqs", [256, pytest.param(4096, marks=pytest.mark.slow)])
def test_many_segments_of_few_keys(device, multiprocessors, num_seqs: int) -> None:
    """Most without rows, and one long: the interpreter takes its time."""
    multiprocessors(20)
    used = [i % 7 for i in range(num_seqs)]
    used[-1] = 900
    rows = [int(i % 64 == 63) for i in range(num_seqs)]
    batch = random_varlen(rows, used, used=used, device=device, num_heads=1, **ONE_HEAD)
    assert_decode_accurate(scheduled(batch), batch)


def test_lengths_change_between_replays(device, multiprocessors) -> None:
    """The same tensors, as a captured graph has them; memory is what the step before left."""
    multiprocessors(5)
    capacities = [400, 64, 1, 900]
    full = random_varlen([1] * 4, capacities, used=capacities, device=device, **SMALL)
    sizes = (full.q, full.v, 4, 1, 900)
    workspace, table = decode_workspace(*sizes, scheduled=True), make_schedule(full)
    for used in ([400, 64, 1, 900], [0, 0, 0, 0], [1, 1, 1, 1], [399, 0, 1, 65], [33, 64, 0, 900]):
        batch = replace(full, seqused_k=torch.tensor(used, dtype=torch.int32, device=device))
        assert make_schedule(batch, out=table) is table
        out = torch.full_like(full.q, torch.nan)
        options = dict(schedule=table[0], workspace=workspace, out=out)
        actual = run_decode(varlen_decode, batch, **options)
        assert actual[0] is out
        assert_identical(actual, scheduled(batch))
        assert_decode_accurate(actual, batch)


def test_a_schedule_from_before_the_append(device, multiprocessors) -> None:
    multiprocessors(3)
    used = [63, 0, 32]
    batch = random_varlen([2, 2, 2], [100, 8, 34], used=used, device=device, **SMALL)
    before = make_schedule(batch, num_new=2)
    new = torch.randn(3, 2, 1, 16, device=device)
    where = (batch.k, batch.v, batch.cu_seqlens_k, batch.seqused_k)
    append.append_kv(new, new, *where)
    assert torch.equal(make_schedule(batch), before)
    actual = run_decode(varlen_decode, batch, schedule=before[0])
    assert_decode_accurate(actual, batch)


@pytest.mark.parametrize("lengths", [[2000] * 4, [131072] + [256] * 63, [820] * 64, [1] * 512])
def test_no_program_has_more_than_its_share(lengths: list[int]) -> None:
    """Nor is there room for more pieces than programs and sequences."""
    plan = decode_launch(128, 2, 4, 1, len(lengths), 1, max(lengths), 132)
    cut = schedule_launch(plan, 4, 1, len(lengths), max(lengths), 132)
    assert cut.num_programs <= 264
    total = sum(-(-n // plan.BLOCK_N) for n in lengths)
    live = -(-total // max(-(-total // cut.num_programs), cut.min_share))
    assert live >= 0.9 * min(total, cut.num_programs) or cut.min_share > 1
    q, v = torch.empty(len(lengths), 4, 128), torch.empty(1, 1, 128)
    size = decode_workspace(q, v, len(lengths), 1, max(lengths), scheduled=True).numel()
    assert size <= (264 + len(lengths)) * 4 * 129


def test_the_host_reads_and_allocates_nothing(monkeypatch, multiprocessors) -> None:
    """Tensors without values do: with its memory given, a step may be captured."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    multiprocessors(10)
    recorders = [Recorder() for _ in range(3)]
    monkeypatch.setattr(schedule, "_schedule_kernel", recorders[0])
    monkeypatch.setattr(decode, "_scheduled_kernel", recorders[1])
    monkeypatch.setattr(decode, "_combine_pieces_kernel", recorders[2])

    def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def ints(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int32)

    q, k, layers = empty(5, 8, 64), empty(640, 2, 64), 3
    workspace = decode_workspace(q, k, 5, 1, 2000, scheduled=True)
    table, starts, used = ints(layers, 5 + 2 + 10), ints(layers, 6), ints(layers, 5)
    with Operators() as operators:
        decode_schedule(q, k, k, starts, 1, 2000, seqused_k=used, num_new=1, out=table)
        for layer in range(layers):
            where = dict(seqused_k=used[layer], schedule=table[layer])
            step = (q, k, k, starts[layer], starts[layer], 1, 2000)
            varlen_decode(*step, out=q, workspace=workspace, **where)
    assert set(operators.names) <= {"select.int", "slice.Tensor"}
    assert recorders[0].grids == [(1, layers)]
    assert recorders[1].grids == [(2, 10)] * layers
    assert recorders[2].grids == [(5 * 8, 1)] * layers


BAD: dict[str, dict[str, Any]] = {
    "cu_seqlens_k: got shape": dict(cu_seqlens_k=torch.zeros(3).int()),
    "cu_seqlens_k: got dtype": dict(cu_seqlens_k=torch.zeros(2, 3).long()),
    "seqused_k: got shape": dict(seqused_k=torch.zeros(2).int()),
    "seqused_k: got dtype": dict(seqused_k=torch.zeros(2, 2)),
    "num_new: got -1": dict(num_new=-1),
    "num_new: got 1, expected 0, or more together with": dict(num_new=1, seqused_k=None),
    "out: got shape": dict(out=torch.zeros(2, 3).int()),
    "k: got dtype": dict(k=torch.zeros(9, 1, 16).half()),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals_name_the_argument(device, message: str) -> None:
    x = torch.zeros(9, 1, 16, device=device)
    arguments: dict[str, Any] = dict(q=torch.zeros(2, 4, 16, device=device), k=x, v=x)
    arguments |= dict(max_seqlen_q=1, max_seqlen_k=9)
    arguments |= dict(cu_seqlens_k=torch.zeros(2, 3, device=device).int())
    arguments |= dict(seqused_k=torch.zeros(2, 2, device=device).int())
    assert len(decode_schedule(**arguments)) == 2
    change = {k: v.to(device) if torch.is_tensor(v) else v for k, v in BAD[message].items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        decode_schedule(**(arguments | change))


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("schedule: got shape", lambda x: x[1:]),
        ("schedule: got dtype", lambda x: x.long()),
        ("schedule: got strides", lambda x: torch.stack([x, x], 1)[:, 0]),
    ],
)
def test_a_decode_refuses_a_schedule_that_does_not_fit(device, message: str, wrong: Any) -> None:
    batch = random_varlen([1, 1], [60, 9], device=device)
    with pytest.raises(ValueError, match=f"^{message}"):
        run_decode(varlen_decode, batch, schedule=wrong(make_schedule(batch)[0]))


def test_an_old_triton_is_refused(device, monkeypatch) -> None:
    monkeypatch.setattr(schedule, "IS_SUPPORTED", False)
    x = torch.zeros(7, 1, 16, device=device)
    with pytest.raises(NotImplementedError, match=r"^schedule: got Triton .*, expected 3\.5"):
        decode_schedule(x, x, x, torch.zeros(1, 2, device=device).int(), 1, 7)
