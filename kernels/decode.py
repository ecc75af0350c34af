"""Split-KV attention of few query rows over variable-length caches, and the append before it.

The interface is that of `flash_attn_varlen_func` (flash-attn 2.8) with FlashAttention-3's
`seqused_k`. Lengths are read on the device and the grid depends on capacities alone, so a step may
be captured in a CUDA graph and replayed while the lengths change.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .append import append_kv
from .checks import (
    expect,
    expect_float,
    expect_int32,
    expect_paged_or_packed,
    expect_same_device,
    num_multiprocessors,
    padded,
)
from .decode_kernels import _combine_kernel, _split_kernel

__all__ = [
    "MAX_SEQLEN_Q",
    "DecodeLaunch",
    "append_kv",
    "decode_launch",
    "decode_workspace",
    "varlen_decode",
]

MAX_SEQLEN_Q = 16
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
) -> DecodeLaunch:
    """Splits of one size for all sequences, as many as two programs a multiprocessor.

    Of a sweep on an H100, that came within 4 % of the best launch of each shape on average (the
    sequences full); more programs start slower than they load. Splits are long enough for the
    partial results of their rows not to matter beside the keys.
    """
    rows = max_seqlen_q * group
    # At most what the registers hold, and 99 KiB of shared memory, which is all some GPUs have.
    most = (128 if head_size <= 64 else 64) // itemsize
    block_m = max(16, min(most, triton.next_power_of_2(rows)))
    num_row_blocks = triton.cdiv(rows, block_m)
    if itemsize == 2:
        block_n, num_warps, num_stages = 32, (2 if block_m == 16 and head_size <= 128 else 4), 3
    else:  # multiplied without matrix instructions: eight warps have the registers for it
        block_n, num_warps, num_stages = (32 if head_size <= 128 else 16), 8, 2
    num_programs = num_seqs * num_kv_heads * num_row_blocks  # of one split
    wanted = round(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors / max(num_programs, 1))
    split_size = triton.cdiv(max_seqlen_k, max(wanted, 1))
    split_size = max(split_size, 4 * min(rows, block_m), 1)
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


def varlen_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
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
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of 1 to 16 query rows a sequence over its cache.

    Args:
        q: `[total_q, num_heads, d]` fp16, bf16 or fp32; d from 1 to 256.
        k, v: `[total_k, num_kv_heads, d]` (`d_v` for v), or pages
            `[num_blocks, page_size, num_kv_heads, d]`, of q's dtype; any strides whose last is 1.
            The ragged layout is num_kv_heads = 1 and a sequence for each (sequence, KV head).
        cu_seqlens_q, cu_seqlens_k: `[num_seqs + 1]` int32. With seqused_k, cu_seqlens_k gives the
            starts, head room included; with pages it only bounds the lengths where seqused_k is
            not given.
        max_seqlen_q, max_seqlen_k: host upper bounds of the lengths; the grid is made for them.
        softmax_scale: default 1 / sqrt(d).
        causal: bottom-right aligned. False by default, as in flash-attn: several rows that continue
            their sequence want True; one row sees all keys either way.
        window_size: (left, right) keys visible round the aligned diagonal, -1 for no bound.
        softcap: logits become tanh(logits / softcap) * softcap where it is above 0.
        seqused_k: `[num_seqs]` int32, live keys of each sequence, on the device.
        block_table: `[num_seqs, max_blocks]` int32.
        first_key_bias: `[num_seqs * num_kv_heads]` fp32, for each sequence, then KV head: added to
            the scaled (and capped) logit of the sequence's first key. Where that key is the mean of
            n others (`store_means`), log(n) gives it their weight; 0 makes it one key like others.
            Not with a left bound, which the first key would fall out of.
        return_softmax_lse: also return the log-sum-exp, `[num_heads, total_q]` fp32, natural log.
        out: `[total_q, num_heads, d_v]`, written where given.
        workspace: what `decode_workspace` makes for these arguments, or a larger one; for the
            launches of one stream. Made where not given.

    Returns:
        `[total_q, num_heads, d_v]` of q's dtype. A row that sees no key is 0 with lse -inf.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: a dtype, head size or query length that is not supported.
    """
    _validate(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, window_size, seqused_k, block_table, out
    )
    _validate_bias(first_key_bias, q, (cu_seqlens_q.numel() - 1) * k.shape[-2], window_size)
    total_q, num_heads, d = q.shape
    num_kv_heads, d_v = v.shape[-2:]
    num_seqs = cu_seqlens_q.numel() - 1
    launch = _launch_for(q, v, num_seqs, max_seqlen_q, max_seqlen_k)
    is_direct = launch.num_splits == 1
    if workspace is not None:
        _validate_workspace(workspace, q, _workspace_size(launch, q, v))
    elif not is_direct:
        size = _workspace_size(launch, q, v)
        workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    paged = block_table is not None
    out = q.new_empty(total_q, num_heads, d_v) if out is None else out
    lse = None
    if return_softmax_lse:
        lse = torch.empty(num_heads, total_q, dtype=torch.float32, device=q.device)
    num_rows = total_q * num_heads
    if not is_direct:
        assert workspace is not None
        partial_out, partial_lse = workspace, workspace[launch.num_splits * num_rows * d_v :]

    scale = d**-0.5 if softmax_scale is None else softmax_scale
    log2_e = math.log2(math.e)
    left, right = window_size[0], 0 if causal else window_size[1]
    max_keys = max_seqlen_k
    if block_table is not None:
        max_keys = min(max_keys, block_table.shape[1] * k.shape[1])
    with torch.cuda.device_of(q):  # the model may lie on several devices
        _split_kernel[(num_seqs * launch.num_row_blocks * num_kv_heads, launch.num_splits)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            cu_seqlens_q_ptr=cu_seqlens_q,
            cu_seqlens_k_ptr=cu_seqlens_k,
            seqused_k_ptr=seqused_k,
            block_table_ptr=block_table,
            first_key_bias_ptr=first_key_bias,
            out_ptr=out if is_direct else partial_out,
            lse_ptr=lse if is_direct else partial_lse,
            scale_log2=scale * log2_e * (2.0 / softcap if softcap > 0 else 1.0),
            softcap_log2=softcap * log2_e,
            window_left=left,
            window_right=right,
            max_blocks=0 if block_table is None else block_table.shape[1],
            max_keys=max_keys,
            num_rows=num_rows,
            num_kv_heads=num_kv_heads,
            num_row_blocks=launch.num_row_blocks,
            split_size=launch.split_size,
            stride_q_row=q.stride(0),
            stride_q_head=q.stride(1),
            stride_k_page=k.stride(0) if paged else 0,
            stride_k_row=k.stride(-3),
            stride_k_head=k.stride(-2),
            stride_v_page=v.stride(0) if paged else 0,
            stride_v_row=v.stride(-3),
            stride_v_head=v.stride(-2),
            stride_out_row=out.stride(0),
            stride_out_head=out.stride(1),
            PAGE_SIZE=k.shape[1] if paged else 1,
            HEAD_SIZE=d,
            HEAD_SIZE_V=d_v,
            D=padded(d),
            D_V=padded(d_v),
            GROUP=num_heads // num_kv_heads,
            BOUND_LEFT=left >= 0,
            BOUND_RIGHT=right >= 0,
            SOFTCAP=softcap > 0,
            DIRECT=is_direct,
            BLOCK_M=launch.BLOCK_M,
            BLOCK_N=launch.BLOCK_N,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            maxnreg=launch.maxnreg,
        )
    if not is_direct:
        with torch.cuda.device_of(q):
            _combine_kernel[(num_seqs * num_heads, max_seqlen_q)](
                partial_out_ptr=partial_out,
                partial_lse_ptr=partial_lse,
                cu_seqlens_q_ptr=cu_seqlens_q,
                cu_seqlens_k_ptr=cu_seqlens_k,
                seqused_k_ptr=seqused_k,
                out_ptr=out,
                lse_ptr=lse,
                max_keys=max_keys,
                num_rows=num_rows,
                num_heads=num_heads,
                split_size=launch.split_size,
                stride_out_row=out.stride(0),
                stride_out_head=out.stride(1),
                HEAD_SIZE_V=d_v,
                D_V=padded(d_v),
                PAGED=paged,
                BLOCK_S=32,
                num_warps=4,
            )
    return (out, lse) if lse is not None else out


def decode_workspace(
    q: Tensor, v: Tensor, num_seqs: int, max_seqlen_q: int, max_seqlen_k: int
) -> Tensor:
    """Memory for the partial results of varlen_decode with these shapes, fp32.

    Only the shapes, dtype and device of q and v (as varlen_decode takes them) matter.
    """
    launch = _launch_for(q, v, num_seqs, max_seqlen_q, max_seqlen_k)
    return torch.empty(_workspace_size(launch, q, v), dtype=torch.float32, device=q.device)


def _workspace_size(launch: DecodeLaunch, q: Tensor, v: Tensor) -> int:
    """A row and its log-sum-exp for each split and (query row, head); none without splits."""
    if launch.num_splits == 1:
        return 0
    return launch.num_splits * q.shape[0] * q.shape[1] * (v.shape[-1] + 1)


def _launch_for(
    q: Tensor, v: Tensor, num_seqs: int, max_seqlen_q: int, max_seqlen_k: int
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
        num_multiprocessors(q.device),
    )


def _validate_workspace(workspace: Tensor, q: Tensor, needed: int) -> None:
    expect_same_device(q=q, workspace=workspace)
    dtype = workspace.dtype
    expect(dtype == torch.float32, "workspace", f"dtype {dtype}", "torch.float32")
    got = f"shape {tuple(workspace.shape)}, strides {workspace.stride()}"
    fits = workspace.dim() == 1 and workspace.is_contiguous() and workspace.numel() >= needed
    expect(fits, "workspace", got, f"one contiguous dimension of {needed} at least")


def _validate_bias(bias: Tensor | None, q: Tensor, size: int, window_size) -> None:
    if bias is None:
        return
    expect_same_device(q=q, first_key_bias=bias)
    name, dtype = "first_key_bias", bias.dtype
    expect(dtype == torch.float32, name, f"dtype {dtype}", "torch.float32")
    expect(tuple(bias.shape) == (size,), name, f"shape {tuple(bias.shape)}", f"({size},)")
    expect(bias.is_contiguous(), name, f"strides {bias.stride()}", "a contiguous tensor")
    no_left_bound = window_size[0] < 0
    expect(no_left_bound, "window_size", window_size, f"no left bound together with {name}")


def _validate(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, window_size, seqused_k, block_table, out
):
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
    expect(q.dim() == 3, "q", f"shape {tuple(q.shape)}", "[total_q, num_heads, d]")
    expect_float("q", q)
    total_q, num_heads, d = q.shape
    for name, x in (("k", k), ("v", v)):
        expect_paged_or_packed(name, x, block_table is not None)
        expect_float(name, x)
        expect(x.dtype == q.dtype, name, f"dtype {x.dtype}", f"{q.dtype}, as q")
        if x.shape[-1] > 256:
            raise NotImplementedError(f"{name}: got head size {x.shape[-1]}, expected at most 256")
    expect(k.shape[-1] == d, "k", f"head size {k.shape[-1]}", f"{d}, as q")
    same = k.shape[:-1] == v.shape[:-1]
    expect(same, "v", f"shape {tuple(v.shape)}", f"({tuple(k.shape[:-1])}, d_v), as k")
    multiple = k.shape[-2] > 0 and num_heads % k.shape[-2] == 0
    expect(multiple, "k", f"{k.shape[-2]} heads", f"a divisor of q's {num_heads} heads")
    if max_seqlen_q > MAX_SEQLEN_Q:
        raise NotImplementedError(
            f"max_seqlen_q: got {max_seqlen_q}, expected at most {MAX_SEQLEN_Q}"
        )
    expect(len(window_size) == 2, "window_size", window_size, "(left, right)")
    num_seqs = cu_seqlens_q.numel() - 1
    expect(num_seqs >= 0, "cu_seqlens_q", "no elements", "num_seqs + 1 elements")
    expect_int32("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,))
    expect_int32("cu_seqlens_k", cu_seqlens_k, (num_seqs + 1,))
    if seqused_k is not None:
        expect_int32("seqused_k", seqused_k, (num_seqs,))
    if block_table is not None:
        expect_int32("block_table", block_table, (num_seqs, block_table.shape[-1]))
    if out is not None:
        shape = (total_q, num_heads, v.shape[-1])
        expect(tuple(out.shape) == shape, "out", f"shape {tuple(out.shape)}", f"{shape}")
        expect(out.dtype == q.dtype, "out", f"dtype {out.dtype}", f"{q.dtype}, as q")
        expect(out.stride(-1) == 1, "out", f"strides {out.stride()}", "1 in the last dimension")
