"""One pass of each kernel on small shapes, for `compute-sanitizer python benchmarks/sanitize.py`.

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1: in the caching allocator's blocks, overruns go unseen.
"""

from __future__ import annotations

import torch
from measure import DEVICE, DTYPE
from torch import Tensor

from vlcache_triton.kernels.checks import FP8_CAPABILITY
from vlcache_triton.kernels.compact import COLUMN_BYTES, IN_PLACE_BYTES
from vlcache_triton.kernels.operators import (
    append_kv,
    compact_kv,
    compact_kv_,
    compact_layers,
    decode_schedule,
    decode_workspace,
    kept_descales,
    key_value_stats,
    post_vision_stats,
    select_tokens,
    store_means,
    sum_evicted,
    varlen_decode,
)

LENGTHS, ROWS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, PAGE_SIZE = [70, 333, 1], 5, 8, 2, 64, 16
ROOM = 3  # rows


def ints(*values: int) -> Tensor:
    """An int32 vector."""
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def floats(*shape: int) -> Tensor:
    """A tensor whose size is no multiple of anything, so that an overrun leaves the allocation."""
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def starts_of(lengths: list[int]) -> Tensor:
    """cu_seqlens."""
    return ints(0, *torch.tensor(lengths).cumsum(0).tolist())


def several_tiles_in_place() -> None:
    """Tiles that move over rows which are still to be read, by columns of either width."""
    for num_heads in (1, 40):  # so few programs that columns are narrow, and enough of them
        length = 3 * IN_PLACE_BYTES // min(COLUMN_BYTES)
        k, v = (floats(length, num_heads, HEAD_SIZE) for _ in range(2))
        scores = torch.rand(num_heads, length, device=DEVICE)
        kept = length - length // 5
        whole, keep, none = ints(0, length), ints(kept), ints(0)
        selection = select_tokens(scores, whole, keep, none, max_seqlen=length)
        rows = selection.indices[: num_heads * kept].view(num_heads, kept).long()
        heads = torch.arange(num_heads, device=DEVICE)[:, None]
        expected = k[rows, heads], v[rows, heads]
        compact_kv_(k, v, whole, *selection, max_kept=kept)
        for x, moved in zip((k, v), expected, strict=True):
            assert torch.equal(x[:kept].transpose(0, 1), moved)


def several_layers() -> None:
    """One launch for a prompt's layers, into fp8 too; a schedule, and a step of each with it."""
    num_layers, length, kept = 2, 333, 70
    k, v = ([floats(length, NUM_KV_HEADS, HEAD_SIZE) for _ in range(num_layers)] for _ in range(2))
    scores = torch.rand(num_layers, NUM_KV_HEADS, length, device=DEVICE)
    whole, keep = ints(0, length), ints(kept).expand(num_layers, 1).contiguous()
    selection = select_tokens(scores, whole, keep, keep // 10, max_seqlen=length)
    k_descale, v_descale = kept_descales(k, v, whole, *selection, max_kept=kept)
    segments = num_layers * NUM_KV_HEADS
    starts = torch.arange(segments + 1, device=DEVICE, dtype=torch.int32) * (kept + 1)
    starts = starts.unfold(0, NUM_KV_HEADS + 1, NUM_KV_HEADS).contiguous()  # [num_layers, ...]
    rows = floats(NUM_KV_HEADS, NUM_HEADS // NUM_KV_HEADS, HEAD_SIZE)
    new = [floats(NUM_KV_HEADS, 1, 1, HEAD_SIZE) for _ in range(2)]
    one, sizes = starts_of([1] * NUM_KV_HEADS), (1, kept + 1)
    has_fp8 = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= FP8_CAPABILITY
    for dtype in (DTYPE, torch.float8_e4m3fn) if has_fp8 else (DTYPE,):
        pools = [floats(segments * (kept + 1), 1, HEAD_SIZE).to(dtype) for _ in range(2)]
        scales = {} if dtype == DTYPE else {"k_descale": k_descale, "v_descale": v_descale}
        compact_layers(k, v, whole, *selection, *pools, starts, max_kept=kept, **scales)
        used = torch.full((num_layers, NUM_KV_HEADS), kept, dtype=torch.int32, device=DEVICE)
        table = decode_schedule(rows, *pools, starts, *sizes, seqused_k=used, num_new=1)
        space = decode_workspace(rows, pools[1], NUM_KV_HEADS, *sizes, scheduled=True)
        for layer in range(num_layers):
            of_layer = {name: x[layer] for name, x in scales.items()}
            append_kv(*new, *pools, starts[layer], used[layer], **of_layer)
            where = (one, starts[layer], *sizes)
            of_layer["seqused_k"] = used[layer]
            expected = varlen_decode(rows, *pools, *where, **of_layer)
            scheduled = {"schedule": table[layer], "workspace": space}
            out = varlen_decode(rows, *pools, *where, **of_layer, **scheduled)
            torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)


def main() -> None:
    torch.manual_seed(0)
    num_seqs, longest, total = len(LENGTHS), max(LENGTHS), sum(LENGTHS)
    starts, starts_q = starts_of(LENGTHS), starts_of([ROWS] * num_seqs)
    q = floats(num_seqs * ROWS, NUM_HEADS, HEAD_SIZE)
    k, v = (floats(total, NUM_KV_HEADS, HEAD_SIZE) for _ in range(2))
    stats = post_vision_stats(q, k, starts_q, starts, ROWS, longest)
    key_value_stats(k, v, starts, longest)
    keep = ints(*(max(1, n // 4) for n in LENGTHS))
    selection = select_tokens(stats.scores, starts, keep, keep // 10, max_seqlen=longest)

    kept = keep.repeat_interleave(NUM_KV_HEADS).tolist()
    pool_starts = starts_of([n + ROOM for n in kept])
    pools = [floats(sum(kept) + len(kept) * ROOM, 1, HEAD_SIZE) for _ in range(2)]
    compact_kv(k, v, starts, *selection, *pools, pool_starts, max_kept=max(kept))
    sums = sum_evicted(k, v, starts, *selection, longest)
    lengths = [n for n in LENGTHS for _ in range(NUM_KV_HEADS)]
    counts = ints(*(n - m for n, m in zip(lengths, kept, strict=True)))
    store_means(*sums, counts, *pools, pool_starts)
    used = ints(*kept)
    new = [floats(len(kept), 1, 1, HEAD_SIZE) for _ in range(2)]
    append_kv(*new, *pools, pool_starts, used)
    rows = floats(len(kept), NUM_HEADS // NUM_KV_HEADS, HEAD_SIZE)
    one = starts_of([1] * len(kept))
    for bound in (max(kept) + ROOM, 4096):  # in one piece, and split
        for bias in (None, torch.ones(len(kept), device=DEVICE)):
            options = dict(causal=True, seqused_k=used, first_key_bias=bias)
            out = varlen_decode(rows, *pools, one, pool_starts, 1, bound, **options)
            assert out.isfinite().all()

    pages = [-(-n // PAGE_SIZE) for n in LENGTHS]
    table = torch.zeros(num_seqs, max(pages), dtype=torch.int32, device=DEVICE)
    order = torch.randperm(sum(pages)).int().to(DEVICE).split(pages)
    for row, mine in zip(table, order, strict=True):
        row[: len(mine)] = mine
    k, v = (floats(sum(pages), PAGE_SIZE, NUM_KV_HEADS, HEAD_SIZE) for _ in range(2))
    post_vision_stats(q, k, starts_q, starts, ROWS, longest, block_table=table)
    key_value_stats(k, v, starts, longest, block_table=table)
    varlen_decode(q, k, v, starts_q, starts, ROWS, longest, causal=True, block_table=table)
    compact_kv_(k, v, starts, *selection, max_kept=max(kept), block_table=table)
    several_tiles_in_place()
    several_layers()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("one pass of each kernel: done")


if __name__ == "__main__":
    main()
