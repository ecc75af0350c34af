"""Device code of score.py: the row pass, the combination of its splits, and the column pass."""

import triton
import triton.language as tl

from . import profiling
from .addressing import live_length, load_rows, offsets_in, pages_of, row_offsets, sequence_start
from .softcap import capped


@triton.jit
def _lengths(seq, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_k_ptr):
    """Start and number of the sequence's query rows, and its live keys."""
    start_q = tl.load(cu_seqlens_q_ptr + seq)
    n_q = tl.load(cu_seqlens_q_ptr + seq + 1) - start_q
    return start_q, n_q, live_length(seq, cu_seqlens_k_ptr, seqused_k_ptr, True)


@triton.jit(
    do_not_specialize=["total_q", "max_blocks", "num_row_blocks", "num_splits", "split_size"],
    launch_metadata=profiling.score_rows,
)
def _row_kernel(
    q_ptr,  # [total_q, num_heads, d]
    k_ptr,  # [total_k, num_kv_heads, d] or pages
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_k_ptr,
    block_table_ptr,
    retained_ptr,  # [num_seqs, num_heads], set to 0 here for the column pass
    visible_ptr,  # [num_seqs]
    row_stats_ptr,  # [1 + num_splits, 2, num_rows]: behind the first, maxima of the logits and sums
    scale_log2,  # softmax_scale * log2(e); with a softcap, softcap * log2(e)
    tanh_log2,  # with a softcap, softmax_scale * 2 * log2(e) / softcap; else None
    total_q,
    max_blocks,
    num_row_blocks,
    num_splits,
    split_size,
    stride_q_row,
    stride_q_head,
    stride_k_page,
    stride_k_row,
    stride_k_head,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Maximum and normaliser over one split of the keys, for BLOCK_M (query row, head) pairs."""
    # Row blocks vary fastest, so that those of one split find its keys in the L2 cache.
    row_block, split = tl.program_id(0) % num_row_blocks, tl.program_id(0) // num_row_blocks
    head, seq = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(1) * GROUP
    start_q, n_q, n_k = _lengths(seq, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_k_ptr)

    if tl.program_id(0) == 0:
        for i in tl.static_range(GROUP):
            tl.store(retained_ptr + seq * num_heads + head * GROUP + i, 0)
        if head == 0:
            # Row i sees n_k - n_q + i + 1 keys; only the last n_k rows see any.
            seeing = tl.minimum(n_q, n_k).to(tl.int64)
            tl.store(visible_ptr + seq, seeing * (n_k - seeing) + seeing * (seeing + 1) // 2)

    if (row_block * BLOCK_M < n_q * GROUP) & (n_k > 0):
        start = sequence_start(seq, cu_seqlens_k_ptr, block_table_ptr, max_blocks)
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        tokens, heads = rows // GROUP, rows % GROUP
        live = tokens < n_q
        at_q = (start_q + tokens).to(tl.int64) * stride_q_row + heads.to(tl.int64) * stride_q_head
        q = load_rows(q_ptr + head * GROUP * stride_q_head, at_q, live, HEAD_SIZE, D)
        last_key = n_k - n_q + tokens
        seen_by_all = tl.maximum(n_k - n_q + row_block * BLOCK_M // GROUP + 1, 0)
        begin = split * split_size
        end = tl.minimum(begin + split_size, n_k)
        full = tl.maximum(tl.minimum(seen_by_all, end) // BLOCK_N * BLOCK_N, begin)

        row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        for masked in tl.static_range(2):  # keys that all rows see, then the others
            coming = (full if masked else begin) + tl.arange(0, BLOCK_N)
            pages = pages_of(coming, coming < n_k, start, block_table_ptr, PAGE_SIZE)
            for key in range(full if masked else begin, end if masked else full, BLOCK_N):
                keys = key + tl.arange(0, BLOCK_N)
                at = offsets_in(
                    pages, keys, block_table_ptr, stride_k_page, stride_k_row, PAGE_SIZE
                )
                k = load_rows(k_ptr + head * stride_k_head, at, keys < n_k, HEAD_SIZE, D)
                logits = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
                if tanh_log2 is not None:
                    logits = capped(logits, tanh_log2)
                if masked:
                    logits = tl.where(keys[None, :] <= last_key[:, None], logits, -float("inf"))
                new_max = tl.maximum(row_max, tl.max(logits, 1))
                shift = new_max
                if masked:  # a row that has seen no key yet: exp2(-inf - 0) is 0, not NaN
                    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
                # An explicit fma, as Triton fuses by itself up to 3.9 only.
                weights = tl.exp2(tl.fma(logits, scale_log2, -(shift * scale_log2)[:, None]))
                row_sum = row_sum * tl.exp2((row_max - shift) * scale_log2) + tl.sum(weights, 1)
                row_max = new_max
                coming = keys + BLOCK_N
                pages = pages_of(coming, coming < n_k, start, block_table_ptr, PAGE_SIZE)

        # num_rows = num_kv_heads * total_q * GROUP_PADDED, in that order
        num_rows = tl.num_programs(1).to(tl.int64) * total_q * GROUP_PADDED
        row = (head * total_q + start_q + tokens) * GROUP_PADDED + heads
        partial = row_stats_ptr + (1 + split) * 2 * num_rows + row
        tl.store(partial, row_max, mask=live)
        tl.store(partial + num_rows, row_sum, mask=live)


@triton.jit(
    do_not_specialize=["num_rows", "num_splits", "rows_per_head"],
    do_not_specialize_on_alignment=["sinks_ptr"],
    launch_metadata=profiling.score_row_stats,
)
def _row_stats_kernel(
    sinks_ptr,  # [num_heads], natural log, or None
    row_stats_ptr,  # [1 + num_splits, 2, num_rows]: of all splits (the least logit that passes the
    #   filter, log2-sum-exp2), made of those of each (maxima of the logits, sums)
    scale_log2,
    margin,  # ln(threshold), in units of what scale_log2 is multiplied with
    num_rows,
    num_splits,
    rows_per_head,  # total_q * GROUP_PADDED, of a KV head
    MAX_SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One maximum and normaliser for each row out of those of its splits, in their order."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = (rows < num_rows) & (rows % GROUP_PADDED < GROUP)
    splits = tl.arange(0, MAX_SPLITS)
    mask = (splits < num_splits)[:, None] & live[None, :]
    num_rows = tl.cast(num_rows, tl.int64)
    partial = row_stats_ptr + (1 + splits)[:, None] * 2 * num_rows + rows[None, :]
    maxima = tl.load(partial, mask=mask, other=-float("inf"))  # [MAX_SPLITS, BLOCK]
    sums = tl.load(partial + num_rows, mask=mask, other=0.0)
    row_max = tl.max(maxima, 0)
    sees_none = row_max == -float("inf")
    shift = tl.where(sees_none, 0.0, row_max)
    total = tl.sum(sums * tl.exp2((maxima - shift[None, :]) * scale_log2), 0)
    # A row that sees no key, or pads its group: +inf makes its probabilities 0 and passes none.
    bound = tl.where(sees_none, float("inf"), row_max + margin)
    lse = shift * scale_log2 + tl.log2(tl.where(sees_none, 1.0, total))
    if sinks_ptr is not None:
        heads = rows // rows_per_head * GROUP + rows % GROUP_PADDED
        sinks = tl.load(sinks_ptr + heads, mask=live, other=-float("inf")).to(tl.float32)
        sinks *= 1.4426950408889634
        top = tl.maximum(lse, sinks)  # of rows that see keys: finite
        lse = top + tl.log2(tl.exp2(lse - top) + tl.exp2(sinks - top))
    lse = tl.where(sees_none, float("inf"), lse)
    tl.store(row_stats_ptr + rows, bound, mask=rows < num_rows)
    tl.store(row_stats_ptr + num_rows + rows, lse, mask=rows < num_rows)


@triton.jit(
    do_not_specialize=["total_q", "max_blocks", "total_k"],
    launch_metadata=profiling.score_columns,
)
def _column_kernel(
    q_ptr,  # [total_q, num_heads, d]
    k_ptr,  # [total_k, num_kv_heads, d] or pages
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_k_ptr,
    block_table_ptr,
    retained_ptr,  # [num_seqs, num_heads]
    row_stats_ptr,  # [1 + num_splits, 2, num_rows], whose first is read
    row_weights_ptr,  # [total_q], or None
    scores_ptr,  # [num_kv_heads, total_k]
    scale_log2,  # softmax_scale * log2(e); with a softcap, softcap * log2(e)
    tanh_log2,  # with a softcap, softmax_scale * 2 * log2(e) / softcap; else None
    total_q,
    max_blocks,
    total_k,
    stride_q_row,
    stride_q_head,
    stride_k_page,
    stride_k_row,
    stride_k_head,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,  # a power of two, so that a column of the tile is always one head
    ROW_MAX: tl.constexpr,
    GROUP_MAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SMALL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scores of BLOCK_N keys of one KV head, and how many of their entries pass the filter.

    Over 100 lines by its arguments: an inner function would have to be told as many again.
    """
    head, seq = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(1) * GROUP
    start_q, n_q, n_k = _lengths(seq, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqused_k_ptr)
    first_key = tl.program_id(0) * BLOCK_N
    if (first_key < n_k) & (n_q > 0):
        start = sequence_start(seq, cu_seqlens_k_ptr, block_table_ptr, max_blocks)
        keys = first_key + tl.arange(0, BLOCK_N)
        at = row_offsets(
            keys, keys < n_k, start, block_table_ptr, stride_k_page, stride_k_row, PAGE_SIZE
        )
        k = load_rows(k_ptr + head * stride_k_head, at, keys < n_k, HEAD_SIZE, D)
        # Row i sees the keys up to n_k - n_q + i. The rows between `full` and `tail`, in whole
        # blocks, see all of these keys and need no mask; the others go by in smaller blocks.
        sees_first = tl.maximum(first_key - (n_k - n_q), 0) * GROUP_PADDED
        sees_last = tl.maximum(first_key + BLOCK_N - 1 - (n_k - n_q), 0) * GROUP_PADDED
        end = tl.cdiv(n_q * GROUP_PADDED, SMALL_M) * SMALL_M
        begin = sees_first // SMALL_M * SMALL_M
        full = tl.minimum(tl.cdiv(sees_last, SMALL_M) * SMALL_M, end)
        tail = full + tl.maximum(n_q * GROUP_PADDED - full, 0) // BLOCK_M * BLOCK_M

        bounds = row_stats_ptr + (head * total_q + start_q) * GROUP_PADDED
        q_ptr += head * GROUP * stride_q_head
        lses = bounds + tl.num_programs(1).to(tl.int64) * total_q * GROUP_PADDED
        # Attention over rows: of all heads of the group together where only sums are asked for.
        BY_HEAD: tl.constexpr = ROW_MAX or GROUP_MAX
        column = tl.zeros((BLOCK_N, GROUP_PADDED) if BY_HEAD else (BLOCK_N,), tl.float32)
        counts = tl.zeros((BLOCK_N, GROUP_PADDED), tl.int32)
        for masked in tl.static_range(2):
            rows = tl.arange(0, SMALL_M if masked else BLOCK_M)
            tokens, heads = rows // GROUP_PADDED, rows % GROUP_PADDED
            length = (full - begin) + (end - tail) if masked else tail - full
            for i in range(0, length, SMALL_M if masked else BLOCK_M):
                row = full + i
                if masked:
                    row = tl.where(begin + i < full, begin + i, begin + i + (tail - full))
                token = row // GROUP_PADDED
                live = tokens < n_q - token if masked else tokens >= 0
                q = load_rows(
                    q_ptr + (start_q + token).to(tl.int64) * stride_q_row,
                    tokens.to(tl.int64) * stride_q_row + heads.to(tl.int64) * stride_q_head,
                    live & (heads < GROUP) if GROUP < GROUP_PADDED else live,
                    HEAD_SIZE,
                    D,
                )
                bound = tl.load(bounds + row + rows, mask=live, other=float("inf"))
                lse = tl.load(lses + row + rows, mask=live, other=float("inf"))
                logits = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
                if tanh_log2 is not None:
                    logits = capped(logits, tanh_log2)
                if masked:
                    last_key = n_k - n_q + token + tokens
                    logits = tl.where(keys[:, None] <= last_key[None, :], logits, -float("inf"))
                attention = tl.exp2(tl.fma(logits, scale_log2, -lse[None, :]))
                if row_weights_ptr is not None:
                    weights = tl.load(
                        row_weights_ptr + start_q + token + tokens, mask=live, other=0.0
                    )
                    attention = attention * weights[None, :]
                if BY_HEAD:  # none is below 0, so that 0 is where a maximum may start
                    attention = attention.reshape(
                        BLOCK_N, rows.shape[0] // GROUP_PADDED, GROUP_PADDED
                    )
                if ROW_MAX:
                    column = tl.maximum(column, tl.max(attention, 1))
                else:
                    column += tl.sum(attention, 1)
                passes = (logits >= bound[None, :]).to(tl.int32)
                passes = passes.reshape(BLOCK_N, rows.shape[0] // GROUP_PADDED, GROUP_PADDED)
                counts += tl.sum(passes, 1)

        if GROUP_MAX:
            column = tl.max(column, 1)
        else:
            column = (tl.sum(column, 1) if BY_HEAD else column) / GROUP
        # With pages too, cu_seqlens_k says where the sequence's scores begin.
        target = scores_ptr + head * total_k + tl.load(cu_seqlens_k_ptr + seq) + keys
        tl.store(target, column, mask=keys < n_k)
        heads = tl.arange(0, GROUP_PADDED)
        # Integers add up to the same whatever the order.
        tl.atomic_add(
            retained_ptr + seq * num_heads + head * GROUP + heads,
            tl.sum(counts, 0).to(tl.int64),
            mask=heads < GROUP,
            sem="relaxed",
        )
