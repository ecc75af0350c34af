"""key_value_stats against the fp32 reference, and what must hold whatever the reference says."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    Operators,
    Varlen,
    assert_accurate,
    assert_identical,
    cumulative,
    other_constants,
    random_varlen,
)
from torch import Tensor

from vlcache_triton.kernels import key_value_stats as module
from vlcache_triton.kernels import reference
from vlcache_triton.kernels.key_value_stats import CHUNK, KeyValueStats, key_value_stats

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def random_cache(lengths: list[int], **shapes: Any) -> Varlen:
    """Keys with a direction in common, as those of models have; of no query rows."""
    batch = random_varlen([0] * len(lengths), lengths, **shapes)
    batch.k += torch.linspace(-1, 1, batch.k.shape[-1], device=batch.k.device).to(batch.k.dtype)
    return batch


def run(function: Any, batch: Varlen, **options: Any) -> KeyValueStats:
    """Either implementation on a batch."""
    arguments = (batch.k, batch.v, batch.cu_seqlens_k, batch.max_seqlen_k)
    return function(*arguments, **(batch.cache | options))


def plain(packed: Varlen, live: list[int], like: KeyValueStats) -> KeyValueStats:
    """The same by plain torch in the dtype of the inputs; `packed` has no pages."""
    stats = KeyValueStats(*(torch.zeros_like(x) for x in like))
    for i, (start, n) in enumerate(zip(packed.cu_seqlens_k.tolist(), live, strict=False)):
        if n == 0:
            continue
        k, v = (x[start : start + n].transpose(0, 1) for x in (packed.k, packed.v))
        mean = F.normalize(k, dim=-1).mean(1, keepdim=True)
        stats.mean_key[i] = mean[:, 0].float()
        stats.mean_key_norm[i] = mean[:, 0].norm(dim=-1).float()
        stats.key_cosine[:, start : start + n] = F.cosine_similarity(k, mean, dim=-1).float()
        stats.value_norm[:, start : start + n] = v.norm(dim=-1).float()
    return stats


CASES: dict[str, dict[str, Any]] = {
    "one key": dict(lengths=[1]),
    "odd lengths": dict(lengths=[1, 63, 111], seed=1),
    "long": dict(lengths=[2000, 3], dtype=BFLOAT),
    "whole chunks": dict(lengths=[CHUNK, 2 * CHUNK, CHUNK + 1], num_kv_heads=1, dtype=FLOAT),
    "empty sequences": dict(lengths=[0, 7, 0, 0, 90, 0], dtype=FLOAT),
    "no keys at all": dict(lengths=[0, 0]),
    "live keys": dict(lengths=[111, 63, 200], used=[70, 0, 200]),
    "pages of 1": dict(lengths=[63, 111], page_size=1, dtype=BFLOAT),
    "pages of 16": dict(lengths=[63, 30, 300], page_size=16),
    "pages of 7, live": dict(lengths=[63, 111], page_size=7, used=[9, 111]),
    "4 KV heads": dict(lengths=[50], num_kv_heads=4, d=80),
    "other head size of V": dict(lengths=[40, 300], d=192, d_v=128, dtype=FLOAT),
    "wider V": dict(lengths=[40], d=64, d_v=96),
    "head size 256": dict(lengths=[111], d=256, dtype=BFLOAT),
    "head size 8": dict(lengths=[40], d=8, dtype=FLOAT),
    "head size 1": dict(lengths=[40], d=1, dtype=FLOAT),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_reference(device: torch.device, case: dict[str, Any]) -> None:
    batch = random_cache(**case, device=device)
    packed = random_cache(**{**case, "page_size": None}, device=device)
    actual, expected = run(key_value_stats, batch), run(reference.key_value_stats, batch)
    plainly = plain(packed, case.get("used", case["lengths"]), expected)
    for name in KeyValueStats._fields:
        of = [getattr(x, name) for x in (actual, plainly, expected)]
        assert of[0].dtype == torch.float32, name
        assert_accurate(*of, floor=2e-6)


def test_keys_of_one_direction(device: torch.device) -> None:
    """However long they are, and whatever their sign; a key of zeros has none."""
    batch = random_cache([40], num_kv_heads=1, num_heads=1, dtype=FLOAT, device=device)
    sizes = torch.logspace(-6, 6, 40, device=device)[:, None, None]
    batch.k[:] = torch.linspace(0.5, 1, 64, device=device) * sizes
    stats = run(key_value_stats, batch)
    torch.testing.assert_close(stats.mean_key_norm, torch.ones(1, 1, device=device))
    torch.testing.assert_close(stats.key_cosine, torch.ones(1, 40, device=device))
    batch.k[3], batch.k[5] = 0, -batch.k[5]
    stats = run(key_value_stats, batch)
    torch.testing.assert_close(stats.mean_key_norm, torch.full((1, 1), 37 / 40, device=device))
    assert stats.key_cosine[0, 3] == 0 and stats.key_cosine[0, 5] < -0.9999


def test_the_norm_of_the_mean_gives_the_mean_cosine_of_two_keys(device: torch.device) -> None:
    batch = random_cache([70], dtype=FLOAT, device=device)
    unit = F.normalize(batch.k.transpose(0, 1), dim=-1)
    cosines = unit @ unit.mT
    expected = (cosines.sum((1, 2)) - 70) / (70 * 69)  # without those of a key to itself
    norm = run(key_value_stats, batch).mean_key_norm[0]
    torch.testing.assert_close((70 * norm.square() - 1) / 69, expected, rtol=1e-4, atol=1e-6)


def test_left_pads_are_no_keys(device: torch.device) -> None:
    """Sequences by their first real row and their length: the way a prompt is handed over."""
    alone = random_cache([50, 31], dtype=FLOAT, device=device)
    padded = random_cache([50, 50], dtype=FLOAT, device=device)
    for x, live in ((padded.k, alone.k), (padded.v, alone.v)):
        x[:50], x[50:69], x[69:] = live[:50], torch.nan, live[50:]
    padded.cu_seqlens_k = torch.tensor([0, 69, 100], dtype=torch.int32, device=device)
    padded.seqused_k = torch.tensor([50, 31], dtype=torch.int32, device=device)
    actual, expected = run(key_value_stats, padded), run(key_value_stats, alone)
    assert_identical(actual[:2], expected[:2])
    for x, y in zip(actual[2:], expected[2:], strict=True):
        assert torch.equal(torch.cat([x[:, :50], x[:, 69:]], 1), y)
        assert not x[:, 50:69].any()


def test_pages_and_strides_change_nothing(device: torch.device) -> None:
    shapes = dict(lengths=[111, 63], device=device)
    expected = run(key_value_stats, random_cache(**shapes))
    for page_size in (1, 16, 100):
        paged = run(key_value_stats, random_cache(**shapes, page_size=page_size))
        assert not paged.key_cosine[:, 174:].any() and not paged.value_norm[:, 174:].any()
        assert_identical([*paged[:2], *(x[:, :174] for x in paged[2:])], expected)
    batch = random_cache(**shapes)
    batch.k = batch.k.transpose(0, 1).contiguous().transpose(0, 1)  # as Transformers has them
    batch.v = torch.cat([batch.v, batch.v], 1)[:, :2]
    assert not batch.k.is_contiguous() and not batch.v.is_contiguous()
    assert_identical(run(key_value_stats, batch), expected)


def test_nothing_is_copied(device: torch.device) -> None:
    batch = random_cache([300, 40], device=device)
    kernels = ("_sum_kernel", "_mean_kernel", "_cosine_kernel")
    launches = mock.patch.multiple(module, **{name: mock.DEFAULT for name in kernels})
    with launches, Operators() as operators:
        run(key_value_stats, batch)
    names = {name.partition(".")[0] for name in operators.names}
    assert names <= {"new_empty", "new_zeros", "empty", "fill_", "zero_", "unbind"}, names


@settings(derandomize=True, max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    chunk=st.sampled_from([8, 24, 256]),
    random=st.randoms(use_true_random=False),
)
def test_sequences_do_not_touch_each_other(lengths: list[int], chunk: int, random) -> None:
    """A batch gives what its sequences give alone, in any order, whatever the chunks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = random_cache(lengths, d=16, device=device)
    order = list(range(len(lengths)))
    random.shuffle(order)
    with other_constants(module, CHUNK=chunk, TILE_BYTES=4 * 16 * 8):
        together = run(key_value_stats, batch)
        k, v = batch.k.split(lengths), batch.v.split(lengths)
        shuffled = key_value_stats(
            torch.cat([k[i] for i in order]),
            torch.cat([v[i] for i in order]),
            cumulative([lengths[i] for i in order], device),
            batch.max_seqlen_k,
        )
    parts = [x.split(lengths, 1) for x in together[2:]]
    expected = [x[order] for x in together[:2]]
    expected += [torch.cat([part[i] for i in order], 1) for part in parts]
    assert_identical(shuffled, expected)
    assert_accurate(together.key_cosine, *[run(reference.key_value_stats, batch).key_cosine] * 2)


BAD = {
    "k:": (ValueError, dict(k=torch.zeros(9, 64).half())),
    "k: got dtype": (NotImplementedError, dict(k=torch.zeros(9, 2, 64).to(torch.float8_e4m3fn))),
    "v: got shape": (ValueError, dict(v=torch.zeros(8, 2, 32).half())),
    "v: got stride": (ValueError, dict(v=torch.zeros(9, 2, 64).half()[..., ::2])),
    "cu_seqlens_k": (ValueError, dict(cu_seqlens_k=torch.tensor([0, 4, 9]))),
    "seqused_k": (ValueError, dict(seqused_k=torch.zeros(3).int())),
    "block_table": (
        ValueError,
        dict(
            k=torch.zeros(2, 5, 2, 64).half(),
            v=torch.zeros(2, 5, 2, 32).half(),
            block_table=torch.zeros(2, 1),
        ),
    ),
}


@pytest.mark.parametrize(("name", "error", "change"), [(k, *v) for k, v in BAD.items()])
def test_refusals_name_the_argument(device, name: str, error, change: dict[str, Any]) -> None:
    usual = dict(
        k=torch.zeros(9, 2, 64).half(),
        v=torch.zeros(9, 2, 32).half(),
        cu_seqlens_k=cumulative([4, 5]),
        max_seqlen_k=5,
    )
    given = {k: x.to(device) if torch.is_tensor(x) else x for k, x in (usual | change).items()}
    with pytest.raises(error, match=f"^{name}"):
        key_value_stats(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("page_size", [None, 16])
def test_large(device: torch.device, dtype: torch.dtype, page_size: int | None) -> None:
    shapes = dict(num_kv_heads=4, num_heads=4, d=128, dtype=dtype, device=device)
    lengths = [32768, 5001]
    batch = random_cache(lengths, **shapes, page_size=page_size)
    expected = run(reference.key_value_stats, batch)
    plainly = plain(random_cache(lengths, **shapes), lengths, expected)
    for actual, *others in zip(run(key_value_stats, batch), plainly, expected, strict=True):
        assert_accurate(actual, *others)


@pytest.mark.gpu
def test_lengths_compile_nothing_new(device: torch.device) -> None:
    kernels = (module._sum_kernel, module._mean_kernel, module._cosine_kernel)

    def compiled() -> int:
        return sum(len(x.device_caches[device.index or 0][0]) for x in kernels)

    run(key_value_stats, random_cache([30, 30], device=device))
    before = compiled()
    for n in (1, 16, 63, 64, 65, 111, 2000, 2048, 10000):
        run(key_value_stats, random_cache([n, n], device=device))
    assert compiled() == before


@pytest.mark.gpu
def test_a_graph_replays_with_other_lengths(device: torch.device) -> None:
    batch = random_cache([700, 64], d=128, device=device)
    batch.seqused_k = torch.tensor([700, 64], dtype=torch.int32, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, which a capture may not
        run(key_value_stats, batch)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = run(key_value_stats, batch)
    for live in ([1, 64], [700, 0], [333, 5]):
        batch.seqused_k.copy_(torch.tensor(live))
        graph.replay()
        assert_identical(stats, run(key_value_stats, batch))


@pytest.mark.gpu
def test_past_2_to_the_31_elements(device: torch.device) -> None:
    far = 2**31 // 64 + 1000
    k: Tensor = torch.zeros(far + 333, 1, 64, dtype=HALF, device=device)
    k[far:] = 1
    table = torch.arange(far, far + 333, dtype=torch.int32, device=device)[None]
    starts = torch.tensor([0, 333], dtype=torch.int32, device=device)
    stats = key_value_stats(k[:, None], k[:, None], starts, 333, block_table=table)
    torch.testing.assert_close(stats.key_cosine, torch.ones(1, 333, device=device))
    torch.testing.assert_close(stats.value_norm, torch.full((1, 333), 8.0, device=device))
