"""Split-KV attention of few query rows over variable-length caches, and the append before it.

The interface is that of `flash_attn_varlen_func` (flash-attn 2.8) with FlashAttention-3's
`seqused_k`. Lengths are read on the device and the grid depends on capacities alone, so a step may
be captured in a CUDA graph and replayed while the lengths change.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .append import append_kv  # the README's name for it, by which engines import it
from .checks import (
    FP8,
    expect,
    expect_array,
    expect_descale,
    expect_dtype,
    expect_per_sequence,
    expect_queries,
    expect_same_device,
    expect_shape,
    expect_sinks,
    expect_starts,
)
from .decode_kernels import _combine_splits_kernel, _split_kernel
from .launch import (
    Launch,
    cache_constants,
    current,
    num_multiprocessors,
    once_per_signature,
    padded,
)
from .schedule_kernels import _combine_pieces_kernel, _scheduled_kernel
from .types import MAX_SEQLEN_Q

__all__ = [
    "MAX_SEQLEN_Q",
    "DecodeLaunch",
    "ScheduleLaunch",
    "append_kv",
    "decode_launch",
    "decode_workspace",
    "schedule_launch",
    "varlen_decode",
]

PROGRAMS_PER_MULTIPROCESSOR = 2


class DecodeLaunch(NamedTuple):
    """Launch of a decode: each program takes BLOCK_M rows and split_size keys."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    maxnreg: int | None
    num_row_blocks: int
    num_splits: int
    split_size: int


def decode_launch(
    head_size: int,
    itemsize: int,
    group: int,
    num_kv_heads: int,
    num_seqs: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    multiprocessors: int,
    num_splits: int = 0,
    *,
    is_fp8: bool = False,
) -> DecodeLaunch:
    """Splits of one size for all sequences, as many as two programs a multiprocessor.

    Of a sweep on an H100, that came within 4 % of the best launch of each shape on average (the
    sequences full); more programs start slower than they load. Splits are long enough for the
    partial results of their rows not to matter beside the keys. Or num_splits, where it is given:
    fewer where whole blocks of keys do not go round.

    K and V in fp8 are converted in registers; Triton reads V's bytes one by one from shared memory
    for it. More warps share them, and fewer keys at once fit in fp32. No GPU has measured it yet.
    """
    rows = max_seqlen_q * group
    # At most what the registers hold, and 99 KiB of shared memory, which is all some GPUs have.
    most = (128 if head_size <= 64 else 64) // itemsize
    block_m = max(16, min(most, triton.next_power_of_2(rows)))
    num_row_blocks = triton.cdiv(rows, block_m)
    if itemsize == 2:
        few_warps = block_m == 16 and head_size <= 128 and not is_fp8
        block_n, num_warps, num_stages = 32, (2 if few_warps else 4), 3
    else:  # multiplied without matrix instructions: eight warps have the registers for it
        block_n, num_warps, num_stages = (32 if head_size <= 128 and not is_fp8 else 16), 8, 2
    num_programs = num_seqs * num_kv_heads * num_row_blocks  # of one split
    wanted = round(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors / max(num_programs, 1))
    split_size = triton.cdiv(max_seqlen_k, num_splits or max(wanted, 1))
    split_size = max(split_size, 1 if num_splits else 4 * min(rows, block_m), 1)
    split_size = triton.cdiv(split_size, block_n) * block_n
    return DecodeLaunch(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        # Left alone, the assembler aims lower in fp32, and keeps 8 bytes in memory.
        maxnreg=255 if itemsize == 4 else None,
        num_row_blocks=num_row_blocks,
        num_splits=max(triton.cdiv(max_seqlen_k, split_size), 1),
        split_size=split_size,
    )


class ScheduleLaunch(NamedTuple):
    """A fixed grid that shares out key blocks (schedule.py): so many programs for each KV head and
    block of rows, of min_share blocks at least where there are as many."""

    num_programs: int
    min_share: int


def schedule_launch(
    launch: DecodeLaunch,
    rows: int,
    num_kv_heads: int,
    num_seqs: int,
    max_seqlen_k: int,
    multiprocessors: int,
) -> ScheduleLaunch:
    """As many programs as run at once, whatever the sequences; rows are max_seqlen_q * group."""
    parts = max(num_kv_heads * launch.num_row_blocks, 1)
    wanted = max(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // parts, 1)
    min_share = max(triton.cdiv(4 * min(rows, launch.BLOCK_M), launch.BLOCK_N), 1)
    most_blocks = num_seqs * triton.cdiv(max_seqlen_k, launch.BLOCK_N)
    return ScheduleLaunch(max(min(wanted, triton.cdiv(most_blocks, min_share)), 1), min_share)


def varlen_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    first_key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int = 0,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    schedule: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of 1 to 16 query rows a sequence over its cache.

    Args:
        q: `[total_q, num_heads, d]` fp16, bf16 or fp32; d from 1 to 256.
        k, v: `[total_k, num_kv_heads, d]` (`d_v` for v), or pages
            `[num_blocks, page_size, num_kv_heads, d]`, of q's dtype or fp8 (e4m3); any strides
            whose last is 1.
            The ragged layout is num_kv_heads = 1 and a sequence for each (sequence, KV head).
        cu_seqlens_q, cu_seqlens_k: `[num_seqs + 1]` int32. With seqused_k, cu_seqlens_k gives the
            starts, head room included; with pages it only bounds the lengths where seqused_k is
            not given, and may be None where it is.
        max_seqlen_q, max_seqlen_k: host upper bounds of the lengths; the grid is made for them.
        softmax_scale: default 1 / sqrt(d).
        causal: bottom-right aligned. False by default, as in flash-attn: several rows that continue
            their sequence want True; one row sees all keys either way.
        window_size: (left, right) keys visible round the aligned diagonal, -1 for no bound. As
            workspace, for engines: no adapter of ours passes it.
        softcap: logits become tanh(logits / softcap) * softcap where it is above 0.
        seqused_k: `[num_seqs]` int32, live keys of each sequence, on the device.
        block_table: `[num_seqs, max_blocks]` int32.
        first_key_bias: `[num_seqs * num_kv_heads]` fp32, for each sequence, then KV head: added to
            the scaled (and capped) logit of the sequence's first key. Where that key is the mean of
            n others (`store_means`), log(n) gives it their weight; 0 makes it one key like others.
            Not with a left bound, which the first key would fall out of.
        sinks: `[num_heads]` fp16, bf16 or fp32, attention sinks as gpt-oss learns them: a logit of
            each query head, neither scaled nor capped, that enters the softmax's denominator and
            nothing else, once, however many splits. Or `[n, num_heads]`, n a divisor of num_seqs:
            sequence i has row i % n, so that a layer's sinks suit the ragged layout as
            `[num_kv_heads, group]`. vLLM, SGLang and FlashInfer have the name; Transformers and
            vLLM's FlashAttention-3 call it s_aux, FlashAttention-4 learnable_sink.
        num_splits: as in flash-attn: into how many parts, at most, the keys are split; 1 for none,
            0 to choose by shape. It changes rounding and time. Not with a schedule, which splits
            by what is live.
        k_descale, v_descale: `[num_seqs, num_kv_heads]` fp32 where K, or V, is fp8: stored value *
            descale = the key, or value, as in FlashAttention-3. They are multiplied in dtype q.
        return_softmax_lse: also return the log-sum-exp, `[num_heads, total_q]` fp32, natural log,
            of the sinks too, as FlashAttention-4 and vLLM have it: to merge two caches by it, give
            the sinks to one of them.
        out: `[total_q, num_heads, d_v]`, written where given.
        workspace: what `decode_workspace` makes for these arguments, or a larger one; for the
            launches of one stream. Made where not given.
        schedule: a layer's row of what `decode_schedule` (schedule.py) makes: the live keys are
            then cut evenly over a fixed grid, and workspace is what decode_workspace makes with
            scheduled=True. A result depends, in its rounding, on the lengths of the others too.

    Returns:
        `[total_q, num_heads, d_v]` of q's dtype. A row that sees no key is 0 with lse -inf, or its
        sink.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: a dtype, head size or query length that is not supported.

    Over 60 lines by the arguments of four launches, a line each.
    """
    launch = _prepare(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        *(seqused_k, block_table, first_key_bias, sinks, k_descale, v_descale),
        out,
        workspace,
        schedule,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=tuple(window_size),
        softcap=softcap,
        num_splits=num_splits,
        multiprocessors=num_multiprocessors(q.device),
    )
    total_q, num_heads = q.shape[:2]
    out = q.new_empty(total_q, num_heads, v.shape[-1]) if out is None else out
    lse = q.new_empty(num_heads, total_q, dtype=torch.float32) if return_softmax_lse else None
    to, to_lse = out, lse
    if launch.combination is not None:
        if workspace is None:
            workspace = q.new_empty(launch.workspace_size, dtype=torch.float32)
        to, to_lse = workspace, workspace[launch.workspace_rows * v.shape[-1] :]
    keys = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "cu_seqlens_q_ptr": cu_seqlens_q,
        "cu_seqlens_k_ptr": cu_seqlens_k,
        "seqused_k_ptr": seqused_k,
        "block_table_ptr": block_table,
        "first_key_bias_ptr": first_key_bias,
        "k_descale_ptr": k_descale,
        "v_descale_ptr": v_descale,
    }
    partial = {"partial_out_ptr": to, "partial_lse_ptr": to_lse}
    result = {"out_ptr": out, "lse_ptr": lse, "cu_seqlens_q_ptr": cu_seqlens_q, "sinks_ptr": sinks}
    with current(q.device):
        if schedule is not None:
            keys |= {"schedule_ptr": schedule, **result}
            _scheduled_kernel.run(**launch.splits, **keys, **partial)
            assert launch.combination is not None
            _combine_pieces_kernel.run(
                **launch.combination, **partial, **result, schedule_ptr=schedule
            )
            return (out, lse) if lse is not None else out
        is_last = launch.combination is None  # then sinks enter here
        keys |= {"out_ptr": to, "lse_ptr": to_lse, "sinks_ptr": sinks if is_last else None}
        _split_kernel.run(**launch.splits, **keys)
        if launch.combination is not None:
            _combine_splits_kernel.run(
                **launch.combination,
                **partial,
                **result,
                cu_seqlens_k_ptr=cu_seqlens_k,
                seqused_k_ptr=seqused_k,
            )
    return (out, lse) if lse is not None else out


class _Prepared(NamedTuple):
    """Launches of a signature: attention of the splits, and their combination where several; or
    of what a schedule gives each program, and of pieces."""

    splits: Launch
    combination: Launch | None
    workspace_rows: int  # of partial results
    workspace_size: int


@once_per_signature
def _prepare(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    block_table,
    first_key_bias,
    sinks,
    k_descale,
    v_descale,
    out,
    workspace,
    schedule,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    num_splits: int,
    multiprocessors: int,
) -> _Prepared:
    """Checks and the launches. Over 60 lines by their arguments, a line each."""
    num_seqs = cu_seqlens_q.numel() - 1
    _check(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, window_size, seqused_k, block_table, out
    )
    num_kv_heads, d_v = v.shape[-2:]
    _check_bias(first_key_bias, q, num_seqs * num_kv_heads, window_size)
    expect_sinks(sinks, q, num_seqs)
    expect_same_device(q=q, k_descale=k_descale, v_descale=v_descale)
    for name, x, descale in (("k_descale", k, k_descale), ("v_descale", v, v_descale)):
        expect_descale(name, descale, x.dtype == FP8, (num_seqs, num_kv_heads))
    _check_splits(num_splits, schedule)
    plan = _launch_for(q, v, num_seqs, max_seqlen_q, max_seqlen_k, multiprocessors, num_splits)
    total_q, num_heads, d = q.shape
    group = num_heads // num_kv_heads
    rows = max_seqlen_q * group
    scheduled = None
    if schedule is not None:
        scheduled = schedule_launch(
            plan, rows, num_kv_heads, num_seqs, max_seqlen_k, multiprocessors
        )
        expect_same_device(q=q, schedule=schedule)
        expect_array("schedule", schedule, (num_seqs + scheduled.num_programs + 2,))
    workspace_rows = _workspace_rows(plan, scheduled, q, num_seqs, rows * num_kv_heads)
    _check_workspace(workspace, q, workspace_rows * (d_v + 1))
    max_keys = max_seqlen_k
    if block_table is not None:
        max_keys = min(max_keys, block_table.shape[1] * k.shape[1])
    scale = (d**-0.5 if softmax_scale is None else softmax_scale) * math.log2(math.e)
    left, right = window_size[0], 0 if causal else window_size[1]
    shared: dict[str, Any] = {  # by both kernels
        "stride_out_row": num_heads * d_v if out is None else out.stride(0),
        "stride_out_head": d_v if out is None else out.stride(1),
        "sink_rows": 1 if sinks is None or sinks.dim() == 1 else sinks.shape[0],
        "HEAD_SIZE_V": d_v,
        "D_V": padded(d_v),
    }
    if scheduled is None:
        lengths = {
            "max_keys": max_keys,
            "num_rows": total_q * num_heads,
            "split_size": plan.split_size,
        }
        shared |= lengths
        combination: dict[str, Any] = {"num_heads": num_heads, "PAGED": block_table is not None}
        splits: dict[str, Any] = {"DIRECT": plan.num_splits == 1}
        grid = (num_seqs * plan.num_row_blocks * num_kv_heads, plan.num_splits)
    else:
        shared |= {
            "total_q": total_q,
            "num_seqs": num_seqs,
            "num_kv_heads": num_kv_heads,
            "GROUP": group,
            "rows_per_piece": rows,
            **scheduled._asdict(),
        }
        combination, splits = {}, {"max_keys": max_keys}
        grid = (plan.num_row_blocks * num_kv_heads, scheduled.num_programs)
    splits |= {
        **shared,
        **cache_constants(block_table, k=k, v=v),
        "scale_log2": scale * (2.0 / softcap if softcap > 0 else 1.0),
        "softcap_log2": softcap * math.log2(math.e),
        "window_left": left,
        "window_right": right,
        "num_kv_heads": num_kv_heads,
        "num_row_blocks": plan.num_row_blocks,
        "stride_q_row": q.stride(0),
        "stride_q_head": q.stride(1),
        "HEAD_SIZE": d,
        "D": padded(d),
        "GROUP": group,
        "BOUND_LEFT": left >= 0,
        "BOUND_RIGHT": right >= 0,
        "SOFTCAP": softcap > 0,
        "BLOCK_M": plan.BLOCK_M,
        "BLOCK_N": plan.BLOCK_N,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
        "maxnreg": plan.maxnreg,
    }
    combination |= {**shared, "BLOCK_S": 32, "num_warps": 4}
    combines = scheduled is not None or plan.num_splits > 1
    return _Prepared(
        Launch(grid, splits),
        Launch((num_seqs * num_heads, max_seqlen_q), combination) if combines else None,
        workspace_rows,
        workspace_rows * (d_v + 1),
    )


def decode_workspace(
    q: Tensor,
    v: Tensor,
    num_seqs: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    num_splits: int = 0,
    scheduled: bool = False,
) -> Tensor:
    """Memory for the partial results of varlen_decode with these shapes, fp32.

    Only the shapes, dtype and device of q and v (as varlen_decode takes them) matter, num_splits,
    and whether a schedule is given.
    """
    multiprocessors, num_kv_heads = num_multiprocessors(q.device), v.shape[-2]
    plan = _launch_for(q, v, num_seqs, max_seqlen_q, max_seqlen_k, multiprocessors, num_splits)
    rows, schedule = max_seqlen_q * q.shape[1] // num_kv_heads, None
    if scheduled:
        schedule = schedule_launch(
            plan, rows, num_kv_heads, num_seqs, max_seqlen_k, multiprocessors
        )
    size = _workspace_rows(plan, schedule, q, num_seqs, rows * num_kv_heads) * (v.shape[-1] + 1)
    return torch.empty(size, dtype=torch.float32, device=q.device)


def _workspace_rows(
    plan: DecodeLaunch, schedule: ScheduleLaunch | None, q: Tensor, num_seqs: int, rows: int
) -> int:
    """Rows, each with its log-sum-exp: one for each split and (query row, head), none without
    splits; with a schedule, `rows` of all heads for each piece."""
    if schedule is not None:
        return (schedule.num_programs + num_seqs) * rows
    return 0 if plan.num_splits == 1 else plan.num_splits * q.shape[0] * q.shape[1]


def _launch_for(
    q: Tensor,
    v: Tensor,
    num_seqs: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    multiprocessors: int,
    num_splits: int = 0,
) -> DecodeLaunch:
    num_kv_heads, d_v = v.shape[-2:]
    return decode_launch(
        max(q.shape[-1], d_v),
        q.element_size(),
        q.shape[1] // num_kv_heads,
        num_kv_heads,
        num_seqs,
        max_seqlen_q,
        max_seqlen_k,
        multiprocessors,
        num_splits,
        is_fp8=v.dtype == FP8,
    )


def _check_splits(num_splits: int, schedule: Tensor | None) -> None:
    expect(num_splits >= 0, "num_splits", num_splits, "0, or how many at most")
    alone = num_splits == 0 or schedule is None
    expect(alone, "num_splits", num_splits, "0 together with a schedule, which splits by itself")


def _check_workspace(workspace: Tensor | None, q: Tensor, needed: int) -> None:
    """Memory for partial results, where the caller gives it."""
    if workspace is not None:
        expect_same_device(q=q, workspace=workspace)
        expect_dtype("workspace", workspace, torch.float32)
        got = f"shape {tuple(workspace.shape)}, strides {workspace.stride()}"
        one_run = workspace.dim() == 1 and workspace.is_contiguous()
        fits = one_run and workspace.numel() >= needed
        expect(fits, "workspace", got, f"one contiguous dimension of {needed} at least")


def _check_bias(bias: Tensor | None, q: Tensor, size: int, window_size) -> None:
    if bias is not None:
        expect_same_device(q=q, first_key_bias=bias)
        expect_array("first_key_bias", bias, (size,), torch.float32)
        expected = "no left bound together with first_key_bias"
        expect(window_size[0] < 0, "window_size", window_size, expected)


def _check(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, window_size, seqused_k, block_table, out
) -> None:
    expect_same_device(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
        out=out,
    )
    expect_queries(q, block_table, or_fp8=True, k=k, v=v)
    if max_seqlen_q > MAX_SEQLEN_Q:
        raise NotImplementedError(
            f"max_seqlen_q: got {max_seqlen_q}, expected at most {MAX_SEQLEN_Q}"
        )
    expect(len(window_size) == 2, "window_size", window_size, "(left, right)")
    num_seqs = cu_seqlens_q.numel() - 1
    expect(num_seqs >= 0, "cu_seqlens_q", "no elements", "num_seqs + 1 elements")
    expect_starts("cu_seqlens_k", cu_seqlens_k, block_table=block_table, seqused_k=seqused_k)
    expect_per_sequence(
        num_seqs,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
    )
    if out is not None:
        expect_shape("out", out, (*q.shape[:2], v.shape[-1]))
        expect_dtype("out", out, q.dtype)
        expect(out.stride(-1) == 1, "out", f"strides {out.stride()}", "1 in the last dimension")
