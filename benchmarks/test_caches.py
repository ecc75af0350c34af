"""varlen_decode on the caches that adapters bring: pages, capacity far above what is live, lengths
that differ between sequences and layers; and the combination of its splits alone.

run_gpu.sh runs this first. The reference sees one sequence at a time: padded to the capacity, some
of these batches would not fit into memory.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, DTYPE, HAS_GPU, check, num_copies
from torch import Tensor

from vlcache_triton.kernels import decode, reference, schedule
from vlcache_triton.kernels.checks import FP8_CAPABILITY

HEADS, D = ((8, 4), 128) if HAS_GPU else ((2, 2), 16)  # KV heads, and query heads of each
SCALE = 1 if HAS_GPU else 64  # a miniature's lengths are shorter by so much
RECORDED = json.loads((Path(__file__).parent / "results" / "kept_lengths.json").read_text())


class Cache(NamedTuple):
    """Live lengths of one layer's sequences, and how they are kept.

    lengths: of each sequence, or of each (sequence, KV head) where it is ragged.
    capacity: max_seqlen_k, which is all that the host knows.
    page_size: None for packed rows.
    """

    lengths: list[int]
    capacity: int
    page_size: int | None = None
    ragged: bool = False


def recorded(longest_prompt: int) -> list[list[int]]:
    """Kept rows `[num_layers][num_seqs]` of a real compression, its prompts made that long."""
    factor = longest_prompt / max(RECORDED["lengths"])
    return [[max(1, round(n * factor)) for n in row] for row in RECORDED["kept"]]


def make_caches() -> dict[str, Cache]:
    """By name, those first that nothing else measures."""

    def tokens(n: int) -> int:
        return max(1, n // SCALE)

    caches = {"page-1": Cache([tokens(2048)] * 64, tokens(2048), 1)}
    # A captured step of a server: 64 requests of 820 tokens each, in a context of 128K.
    for size in (1, 16):
        caches[f"capacity-page-{size}"] = Cache([tokens(820)] * 64, tokens(131072), size)
    caches["64x2048"] = Cache([tokens(2048)] * 64, tokens(2048))
    caches |= {f"page-{n}": Cache([tokens(2048)] * 64, tokens(2048), n) for n in (16, 64)}
    caches |= {f"one-page-{n}": Cache([tokens(8192)], tokens(8192), n) for n in (1, 16, 64)}
    # A layer that keeps 1.3K where another keeps 52K; one row of 128K beside 63 of 256.
    caches["capacity-ragged"] = Cache([tokens(1300)] * HEADS[0], tokens(52000), ragged=True)
    caches["one-long"] = Cache([tokens(131072), *[tokens(256)] * 63], tokens(131072))
    layers = sorted(recorded(tokens(32768)), key=sum)
    longest = max(map(max, layers)) + tokens(256)  # with head room
    for name, kept in (("least", layers[0]), ("most", layers[-1])):
        lengths = [n for n in kept for _ in range(HEADS[0])]
        caches[f"recorded-{name}"] = Cache(lengths, longest, ragged=True)
    if not HAS_GPU:  # a program takes the interpreter milliseconds
        for name, x in caches.items():
            caches[name] = x._replace(lengths=[min(n, 300) for n in x.lengths[:3]])
    return caches


CACHES = make_caches()
SCHEDULED = {"capacity-page-16", "64x2048", "one-page-16", "capacity-ragged", "one-long"}
SCHEDULED |= {"recorded-least", "recorded-most"}
HAS_FP8 = not HAS_GPU or torch.cuda.get_device_capability() >= FP8_CAPABILITY
IN_FP8 = {"page-1", "64x2048", "capacity-ragged"} if HAS_FP8 else set()
DESCALE = 2.0**-5  # of normal numbers: none comes near 448 of it


class Inputs(NamedTuple):
    """One set of tensors, and the keyword arguments that say where its rows are."""

    q: Tensor
    k: Tensor
    v: Tensor
    starts_q: Tensor
    starts_k: Tensor
    max_seqlen_k: int
    where: dict[str, Tensor]

    def decode(self, **more: Tensor) -> Tensor:
        """One step."""
        starts = self.starts_q, self.starts_k
        args = (self.q, self.k, self.v, *starts, 1, self.max_seqlen_k)
        return decode.varlen_decode(*args, causal=True, **self.where, **more)


def make(cache: Cache, seed: int = 0) -> Inputs:
    """Rows of all sequences in one pool, pages in shuffled order."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=DTYPE)

    heads, group = (1, HEADS[1]) if cache.ragged else HEADS
    used = torch.tensor(cache.lengths, dtype=torch.int32, device=DEVICE)
    num_seqs, where = len(used), {"seqused_k": used}
    starts = F.pad(used.cumsum(0), (1, 0)).int()
    shape: tuple[int, ...] = (sum(cache.lengths), heads, D)
    if cache.page_size is not None:
        pages = [-(-n // cache.page_size) for n in cache.lengths]
        order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(seed)).int()
        width = -(-cache.capacity // cache.page_size)
        table = torch.zeros(num_seqs, width, dtype=torch.int32)
        for row, part in zip(table, order.split(pages), strict=True):
            row[: len(part)] = part
        where["block_table"] = table.to(DEVICE)
        shape = (sum(pages), cache.page_size, heads, D)
        starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE) * cache.capacity
    return Inputs(
        normal(num_seqs, heads * group, D),
        normal(*shape),
        normal(*shape),
        torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE),
        starts,
        cache.capacity,
        where,
    )


def expected(x: Inputs) -> Tensor:
    """The fp32 reference, one sequence after the other."""
    parts = []
    for i, n in enumerate(x.where["seqused_k"].tolist()):
        one, starts = slice(i, i + 1), x.starts_k[i : i + 2]
        where = {name: y[one] for name, y in x.where.items()}
        args = (x.q[one].float(), x.k, x.v, x.starts_q[:2], starts, 1, n)
        parts.append(reference.varlen_decode(*args, causal=True, **where))
    return torch.cat(parts)


@functools.lru_cache(maxsize=1)
def case(name: str) -> list[Inputs]:
    """Inputs in rotation, the first of which was checked."""
    cache = CACHES[name]
    inputs = [make(cache)]
    check(inputs[0].decode(), expected(inputs[0]))
    copies = num_copies(inputs[0].k.nbytes + inputs[0].v.nbytes)
    return [*inputs, *(make(cache, seed) for seed in range(1, copies))]


def facts(name: str) -> dict[str, object]:
    """What the report says of a cache."""
    cache = CACHES[name]
    return {
        "cache": name,
        "num_seqs": len(cache.lengths),
        "length": max(cache.lengths),
        "capacity": cache.capacity,
        "live": sum(cache.lengths),
    }


def in_fp8(x: Inputs) -> Inputs:
    """The same in 8 bits, of one scale."""
    k, v = ((y / DESCALE).to(torch.float8_e4m3fn) for y in (x.k, x.v))
    scales = torch.full((len(x.q), k.shape[-2]), DESCALE, device=DEVICE)
    return x._replace(k=k, v=v, where=x.where | {"k_descale": scales, "v_descale": scales})


def table_of(x: Inputs) -> Tensor:
    """What a step makes for a layer like this."""
    where = x.where | {"seqused_k": x.where["seqused_k"][None]}
    args = (x.q, x.k, x.v, x.starts_k[None], 1, x.max_seqlen_k)
    return schedule.decode_schedule(*args, **where)


BY = {"ours": set(CACHES), "ours, scheduled": SCHEDULED, "ours, fp8": IN_FP8}
WAYS = [(name, by) for name in CACHES for by, names in BY.items() if name in names]


@pytest.mark.parametrize(("name", "by"), WAYS)
def test_caches(measure, name, by):
    """A schedule is made once a step for all layers, and is not in the time."""
    inputs = case(name)
    if by == "ours, fp8":
        inputs = [in_fp8(x) for x in inputs]
        check(inputs[0].decode(), expected(inputs[0]))
    launches: list[Callable] = [x.decode for x in inputs]
    if by == "ours, scheduled":
        launches = [functools.partial(x.decode, schedule=table_of(x)[0]) for x in inputs]
        check(launches[0](), expected(inputs[0]))
    q, k = inputs[0].q, inputs[0].k
    row = k.shape[-2] * D * k.itemsize
    nbytes = 2 * sum(CACHES[name].lengths) * row + 2 * q.nbytes  # K and V that live; q, output
    measure(launches, nbytes=nbytes, peer=by, **facts(name))


@pytest.mark.parametrize("name", ["capacity-ragged", "one-long"])
def test_schedule(measure, name):
    """The table of 32 layers."""
    x = case(name)[0]
    starts, used = x.starts_k.expand(32, -1).contiguous(), x.where["seqused_k"].expand(32, -1)
    args = (x.q, x.k, x.v, starts, 1, x.max_seqlen_k)
    table = schedule.decode_schedule(*args, seqused_k=used.contiguous())
    launch = functools.partial(schedule.decode_schedule, *args, seqused_k=used.contiguous())
    assert torch.equal(launch(out=table)[0], table_of(x)[0])
    measure(
        [functools.partial(launch, out=table)], nbytes=table.nbytes, peer="table", **facts(name)
    )


class NotLaunched:
    """Takes a kernel's place and runs nothing."""

    def run(self, **arguments: object) -> None:
        """Nothing."""


@pytest.mark.parametrize("name", ["one-page-16", "capacity-ragged", "recorded-most"])
def test_combination(measure, name):
    """The second kernel on the partial results that the first has left."""
    inputs = case(name)
    sizes = 1, CACHES[name].capacity
    spaces = [decode.decode_workspace(x.q, x.v, len(x.q), *sizes) for x in inputs]
    if not spaces[0].numel():
        pytest.skip("one split: nothing to combine")
    whole = [x.decode(workspace=w) for x, w in zip(inputs, spaces, strict=True)]
    with mock.patch.object(decode, "_split_kernel", NotLaunched()):
        launches = [
            functools.partial(x.decode, workspace=w) for x, w in zip(inputs, spaces, strict=True)
        ]
        assert torch.equal(launches[0](), whole[0])
        measure(launches, nbytes=spaces[0].nbytes, peer="combination", **facts(name))
