"""Rows on pages whose number is known need no starts: cu_seqlens_k=None is what ends there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kept import pools, random_case
from support import MEANT_INFINITIES, assert_identical, random_varlen, run_decode

from vlcache_triton.kernels import append, compact, decode, reference, remainder, schedule

pytestmark = MEANT_INFINITIES
USED = [70, 0, 111]


def batch_on_pages(device: torch.device, page_size: int) -> Any:
    shapes: dict[str, Any] = dict(lengths_q=[1, 2, 1], lengths_k=[90, 9, 120], used=USED)
    return random_varlen(**shapes, page_size=page_size, device=device)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("module", [decode, reference])
def test_decode(device: torch.device, module: Any, page_size: int) -> None:
    batch = batch_on_pages(device, page_size)
    for num_splits in (1, 3):
        given, without = (
            run_decode(module.varlen_decode, x, num_splits=num_splits)
            for x in (batch, replace(batch, cu_seqlens_k=None))
        )
        assert_identical(without, given)


@pytest.mark.skipif(not schedule.IS_SUPPORTED, reason="needs Triton 3.5")
def test_decode_by_a_schedule(device: torch.device) -> None:
    batch = batch_on_pages(device, 16)
    facts = (batch.q, batch.k, batch.v)
    where: dict[str, Any] = dict(seqused_k=batch.seqused_k[None], block_table=batch.block_table)
    given, without = (
        schedule.decode_schedule(*facts, starts, 2, 120, num_new=1, **where)
        for starts in (batch.cu_seqlens_k[None], None)
    )
    assert_identical([without], [given])
    bare = replace(batch, cu_seqlens_k=None)
    assert_identical(
        run_decode(decode.varlen_decode, bare, schedule=without[0]),
        run_decode(decode.varlen_decode, batch, schedule=given[0]),
    )
    with pytest.raises(
        ValueError, match=r"^cu_seqlens_k: got None, expected starts, or block_tabl"
    ):
        schedule.decode_schedule(*facts, None, 2, 120, block_table=batch.block_table)
    with pytest.raises(ValueError, match=r"^seqused_k: got shape \(3,\)"):
        schedule.decode_schedule(*facts, None, 2, 120, **where | {"seqused_k": batch.seqused_k})


@pytest.mark.parametrize("module", [append, reference])
def test_append(device: torch.device, module: Any) -> None:
    batch = batch_on_pages(device, 16)
    new = torch.randn(3, 2, 2, 64, device=device).half()
    written = []
    for starts in (batch.cu_seqlens_k, None):
        k, v, used = batch.k.clone(), batch.v.clone(), batch.seqused_k.clone()
        module.append_kv(new, new, k, v, starts, used, block_table=batch.block_table)
        written.append([k, v, used])
    assert_identical(*written)


@pytest.mark.parametrize("module", [compact, reference])
def test_compaction(device: torch.device, module: Any) -> None:
    case = random_case([130, 7], [33, 120, 2, 7], page_size=16, device=device)
    selection = {k: v for k, v in case.selection.items() if k != "cu_seqlens_k"}
    (k, v), starts, table = pools(case, 16)
    moved = []
    for of_source, of_target in ((case.cu_seqlens_k, starts), (None, None)):
        out = [k.clone(), v.clone()]
        target = dict(out_k=out[0], out_v=out[1], cu_seqlens_out=of_target, out_block_table=table)
        module.compact_kv(case.k, case.v, cu_seqlens_k=of_source, **selection, **target)
        moved.append(out)
    assert_identical(*moved)
    in_place = []
    for of_source in (case.cu_seqlens_k, None):
        rows = [case.k.clone(), case.v.clone()]
        module.compact_kv_(*rows, cu_seqlens_k=of_source, **selection)
        in_place.append(rows)
    assert_identical(*in_place)


@pytest.mark.parametrize("module", [remainder, reference])
def test_a_row_for_what_is_evicted(device: torch.device, module: Any) -> None:
    case = random_case([130, 7], [33, 120, 2, 7], page_size=16, device=device)
    used = torch.tensor([130, 7], dtype=torch.int32, device=device)
    where: dict[str, Any] = dict(seqused_k=used, block_table=case.block_table)
    kept = (case.indices, case.cu_kept, 130)
    given, without = (
        module.sum_evicted(case.k, case.v, starts, *kept, **where)
        for starts in (case.cu_seqlens_k, None)
    )
    assert_identical(without, given)
    with pytest.raises(
        ValueError, match=r"^cu_seqlens_k: got None, expected starts, or block_tabl"
    ):
        remainder.sum_evicted(case.k, case.v, None, *kept, block_table=case.block_table)
    (k, v), starts, table = pools(case, 16)
    counts = torch.tensor([97, 10, 5, 0], dtype=torch.int32, device=device)
    stored = []
    for of_target in (starts, None):
        out = [k.clone(), v.clone()]
        module.store_means(*given, counts, *out, of_target, out_block_table=table)
        stored.append(out)
    assert_identical(*stored)
    with pytest.raises(
        ValueError, match=r"^cu_seqlens_out: got None, expected starts, or out_block"
    ):
        remainder.store_means(*given, counts, k[:, 0], v[:, 0], None)
