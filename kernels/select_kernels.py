"""Device code of select.py: a radix search for the least kept score, and the kept positions."""

import triton
import triton.language as tl

from . import profiling


@triton.jit
def _kept_before(cu_seqlens_ptr, keep_ptr, num_seqs, end, BLOCK: tl.constexpr):
    """Kept tokens of one KV head in the first `end` (layer, sequence) pairs."""
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, end, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        mask = pairs < end
        seqs = pairs % num_seqs
        length = tl.load(cu_seqlens_ptr + seqs + 1, mask=mask, other=0)
        length -= tl.load(cu_seqlens_ptr + seqs, mask=mask, other=0)
        keep = tl.load(keep_ptr + pairs, mask=mask, other=0)
        total += tl.maximum(tl.minimum(keep, length), 0)
    return tl.sum(total)


@triton.jit
def _load_ranks(scores_ptr, positions, end):
    """Scores at positions below `end` as unsigned integers that fall as the scores rise."""
    scores = tl.load(scores_ptr + positions, mask=positions < end, other=0.0)
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -(2**31), 0, bits)  # -0.0
    return tl.where(bits < 0, bits, bits ^ 0x7FFFFFFF).to(tl.uint32, bitcast=True)


@triton.jit(
    do_not_specialize=["num_segments", "num_seqs", "num_kv_heads", "total_k", "total_kept"],
    launch_metadata=profiling.select,
)
def _select_kernel(
    scores_ptr,  # [num_layers, num_kv_heads, total_k]
    cu_seqlens_ptr,
    keep_ptr,  # [num_layers, num_seqs]
    recent_ptr,  # [num_layers, num_seqs]
    indices_ptr,  # [total_kept]
    cu_kept_ptr,  # [num_segments + 1]
    num_segments,
    num_seqs,
    num_kv_heads,
    total_k,
    total_kept,
    BLOCK: tl.constexpr,
):
    """Select the kept positions of one segment and write them at its place."""
    segment = tl.program_id(0)
    pair, head = segment // num_kv_heads, segment % num_kv_heads
    before = _kept_before(cu_seqlens_ptr, keep_ptr, num_seqs, pair, BLOCK) * num_kv_heads
    if segment == num_segments:
        tl.store(cu_kept_ptr + segment, before)
    else:
        layer, seq = pair // num_seqs, pair % num_seqs
        first = tl.load(cu_seqlens_ptr + seq)
        length = tl.load(cu_seqlens_ptr + seq + 1) - first
        keep = tl.maximum(tl.minimum(tl.load(keep_ptr + pair), length), 0)
        window = tl.maximum(tl.minimum(tl.load(recent_ptr + pair), keep), 0)
        offset = before + head * keep
        tl.store(cu_kept_ptr + segment, offset)

        scores_ptr += (layer.to(tl.int64) * num_kv_heads + head) * total_k + first
        ranked = length - window  # the positions that compete; the window behind them is kept
        # Find the rank of the last score that is kept, from its highest digit to its lowest:
        # `prefix` are the digits found, `taken` how many of its candidates are still to be kept.
        prefix = tl.zeros((), tl.uint32)
        taken, candidates = keep - window, ranked
        for shift in tl.static_range(24, -1, -8):
            # Once all candidates are kept, or none is, lower digits tell nothing apart: those of an
            # empty histogram let all of them pass.
            end = tl.where((taken > 0) & (taken < candidates), ranked, 0)
            histogram = tl.zeros((256,), tl.int32)
            for start in range(0, end, BLOCK):
                positions = start + tl.arange(0, BLOCK)
                ranks = _load_ranks(scores_ptr, positions, ranked)
                candidate = positions < ranked
                if shift < 24:
                    candidate = candidate & (ranks >> (shift + 8) == prefix >> (shift + 8))
                digits = (ranks >> shift) & 255
                histogram += tl.histogram(digits.to(tl.int32), 256, mask=candidate)
            up_to = tl.cumsum(histogram, 0)
            digit = tl.minimum(tl.sum((up_to < taken).to(tl.int32)), 255)
            bins = tl.arange(0, 256)
            found = tl.sum(tl.where(bins == digit, histogram, 0))
            candidates = tl.where(end > 0, found, candidates)
            taken -= tl.sum(tl.where(bins < digit, histogram, 0))
            prefix |= digit.to(tl.uint32) << shift

        # Keep what ranks before `prefix`, the first `taken` of what equals it, and the window.
        better_before = tl.zeros((), tl.int32)
        equal_before = tl.zeros((), tl.int32)
        for start in range(0, length, BLOCK):
            positions = start + tl.arange(0, BLOCK)
            ranks = _load_ranks(scores_ptr, positions, ranked)
            competes = positions < ranked
            better = (competes & (ranks < prefix)) | ~competes
            equal = competes & (ranks == prefix)
            # Both counted by one scan: a block has fewer than 2**16 of each.
            counts = better.to(tl.int32) + (equal.to(tl.int32) << 16)
            ahead = tl.cumsum(counts, 0) - counts
            better_rank = better_before + (ahead & 0xFFFF)
            equal_rank = equal_before + (ahead >> 16)
            kept = better | (equal & (equal_rank < taken))
            target = offset + better_rank + tl.minimum(equal_rank, taken)
            kept = kept & (positions < length) & (target < total_kept)
            tl.store(indices_ptr + target, positions, mask=kept)
            total = tl.sum(counts)
            better_before += total & 0xFFFF
            equal_before += total >> 16
