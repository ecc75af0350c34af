"""The live keys of all sequences cut evenly over the programs that run at once, on the device.

Sequences of unequal lengths leave programs of `varlen_decode` idle: its grid and its splits know of
capacities alone. A schedule is made once a step, by one small kernel for all layers, and handed to
each layer's `varlen_decode`. The host learns no length: a step with its schedule may be captured in
a CUDA graph and replayed while the lengths change. The same lengths give the same bits.

Stream-K (Osama et al., PPoPP 2023, arXiv:2301.03598) is this for matrix products; FlashInfer plans
the like on the host, where it has to know the lengths.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .checks import expect, expect_array, expect_queries, expect_same_device, expect_starts
from .decode import _launch_for, schedule_launch
from .launch import Launch, current, num_multiprocessors, once_per_signature
from .schedule_kernels import IS_SUPPORTED, _schedule_kernel

SEQS, PROGRAMS = 256, 16  # looked at at once: a tile of comparisons


def decode_schedule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_new: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """What each layer's `varlen_decode` of one step takes as `schedule`, row by row.

    Args:
        q, k, v, max_seqlen_q, max_seqlen_k, block_table: as varlen_decode takes them in the layers;
            of q, k, v and block_table the shapes, dtypes and device alone matter.
        cu_seqlens_k: `[num_layers, num_seqs + 1]` int32; may be None for pages with seqused_k.
        seqused_k: `[num_layers, num_seqs]` int32, live keys on the device.
        num_new: keys that `append_kv` adds to every sequence between this and a layer's decode.
            Keys that a layer has beyond what its schedule knows are not attended to.
        out: what an earlier call with these shapes returned, written anew: for graphs.

    Returns:
        `[num_layers, n]` int32; n follows from the shapes, and is num_seqs and the number of
        programs with two more.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: a dtype or head size that is not supported, and Triton before 3.5.
    """
    launch = _prepare(
        q,
        k,
        v,
        cu_seqlens_k,
        seqused_k,
        block_table,
        out,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        num_new=num_new,
        multiprocessors=num_multiprocessors(q.device),
    )
    if out is None:
        shape = launch["grid"][1], launch["stride_schedule"]
        out = torch.empty(shape, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    with current(q.device):
        _schedule_kernel.run(
            **launch,
            cu_seqlens_k_ptr=cu_seqlens_k,
            seqused_k_ptr=seqused_k,
            schedule_ptr=out,
        )
    return out


@once_per_signature
def _prepare(
    q,
    k,
    v,
    cu_seqlens_k,
    seqused_k,
    block_table,
    out,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_new: int,
    multiprocessors: int,
) -> Launch:
    if not IS_SUPPORTED:
        got = f"got Triton {triton.__version__}"
        raise NotImplementedError(f"schedule: {got}, expected 3.5 or later")
    expect_same_device(
        q=q, k=k, v=v, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, block_table=block_table
    )
    expect_queries(q, block_table, or_fp8=True, k=k, v=v)
    expect_starts("cu_seqlens_k", cu_seqlens_k, block_table=block_table, seqused_k=seqused_k)
    if cu_seqlens_k is None:
        two = seqused_k.dim() == 2
        got = f"shape {tuple(seqused_k.shape)}"
        expect(two, "seqused_k", got, "[num_layers, num_seqs]")
        num_layers, num_seqs = seqused_k.shape
    else:
        shape = tuple(cu_seqlens_k.shape)
        many = len(shape) == 2 and shape[1] > 0
        expect(many, "cu_seqlens_k", f"shape {shape}", "[num_layers, num_seqs + 1]")
        expect_array("cu_seqlens_k", cu_seqlens_k, shape)
        num_layers, num_seqs = shape[0], shape[1] - 1
    if seqused_k is not None:
        expect_array("seqused_k", seqused_k, (num_layers, num_seqs))
    growing = num_new >= 0 and (num_new == 0 or seqused_k is not None)
    expect(growing, "num_new", num_new, "0, or more together with seqused_k")
    num_kv_heads = k.shape[-2]
    plan = _launch_for(q, v, num_seqs, max_seqlen_q, max_seqlen_k, multiprocessors)
    rows = max_seqlen_q * q.shape[1] // num_kv_heads
    cut = schedule_launch(plan, rows, num_kv_heads, num_seqs, max_seqlen_k, multiprocessors)
    width = num_seqs + cut.num_programs + 2
    if out is not None:
        expect_same_device(q=q, out=out)
        expect_array("out", out, (num_layers, width))
    max_keys = max_seqlen_k
    if block_table is not None:
        max_keys = min(max_keys, block_table.shape[1] * k.shape[1])
    constants = {
        "num_seqs": num_seqs,
        **cut._asdict(),
        "num_new": num_new,
        "max_keys": max_keys,
        "stride_cu_seqlens_k": num_seqs + 1,
        "stride_seqused_k": num_seqs,
        "stride_schedule": width,
        "PAGED": block_table is not None,
        "BLOCK_N": plan.BLOCK_N,
        "SEQS": SEQS,
        "PROGRAMS": PROGRAMS,
        "num_warps": 4,
    }
    return Launch((triton.cdiv(cut.num_programs + 1, PROGRAMS), num_layers), constants)
