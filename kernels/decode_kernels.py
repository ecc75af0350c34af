"""Device code of decode.py: attention over one split of the keys, and the combination of splits."""

import triton
import triton.language as tl

from . import profiling
from .addressing import live_length, load_rows, offsets_in, pages_of, sequence_start, store_rows
from .softcap import capped

# Of lengths, single elements are read: where a layer's part of a tensor starts is no reason to
# compile anew.
LENGTHS = ["cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "seqused_k_ptr"]
OF_HEADS = ["first_key_bias_ptr", "sinks_ptr", "k_descale_ptr", "v_descale_ptr"]


@triton.jit
def live_keys(seq, cu_seqlens_k_ptr, seqused_k_ptr, max_keys, PAGED: tl.constexpr):
    """Live keys of a sequence: never more than it has memory for."""
    return tl.minimum(live_length(seq, cu_seqlens_k_ptr, seqused_k_ptr, not PAGED), max_keys)


@triton.jit
def _attend(
    q,  # [BLOCK_M, D]
    row_max,  # [BLOCK_M], log2, of the keys seen so far; so are the next two
    row_sum,  # [BLOCK_M]
    acc,  # [BLOCK_M, D_V]
    k_ptr,  # at the KV head
    v_ptr,
    block_table_ptr,
    start,  # of the sequence, as sequence_start has it
    begin,
    end,
    n_k,
    diagonal,  # [BLOCK_M], the key that each row is aligned with
    bias,  # of the first key, log2, or None
    scale_log2,
    softcap_log2,
    window_left,
    window_right,
    stride_k_page,
    stride_k_row,
    stride_v_page,
    stride_v_row,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,  # whether some row may not see some key
    BLOCK_N: tl.constexpr,
):
    """What the rows have seen, with the keys from begin to end. Long by what it is told."""
    coming = begin + tl.arange(0, BLOCK_N)
    pages = pages_of(coming, coming < n_k, start, block_table_ptr, PAGE_SIZE)
    for key in range(begin, end, BLOCK_N):
        keys = key + tl.arange(0, BLOCK_N)
        live = keys < n_k if MASKED else None
        at = offsets_in(pages, keys, block_table_ptr, stride_k_page, stride_k_row, PAGE_SIZE)
        k = load_rows(k_ptr, at, live, HEAD_SIZE, D).to(q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            logits = capped(logits, scale_log2)
        if bias is not None:  # costs no instruction more but the select
            addend = tl.where(keys == 0, bias, 0.0)[None, :]
            logits = tl.fma(logits, softcap_log2 if SOFTCAP else scale_log2, addend)
        else:
            logits = logits * (softcap_log2 if SOFTCAP else scale_log2)
        if MASKED:
            seen = (keys < n_k)[None, :]
            if BOUND_RIGHT:
                seen = seen & (keys[None, :] <= diagonal[:, None] + window_right)
            if BOUND_LEFT:
                seen = seen & (keys[None, :] >= diagonal[:, None] - window_left)
            logits = tl.where(seen, logits, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        shift = new_max
        if MASKED:  # a row that has seen no key yet: exp2(-inf - 0) is 0, not NaN
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(logits - shift[:, None])  # [BLOCK_M, BLOCK_N]
        correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        row_max = new_max
        at = offsets_in(pages, keys, block_table_ptr, stride_v_page, stride_v_row, PAGE_SIZE)
        v = load_rows(v_ptr, at, live, HEAD_SIZE_V, D_V).to(q.dtype)
        acc = acc * correction[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        coming = keys + BLOCK_N
        pages = pages_of(coming, coming < n_k, start, block_table_ptr, PAGE_SIZE)
    return row_max, row_sum, acc


@triton.jit
def attend_rows(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    first_key_bias_ptr,
    k_descale_ptr,
    v_descale_ptr,
    seq,
    head,
    row_block,
    start_q,
    n_q,
    start,  # of the sequence's keys, as sequence_start has it
    begin,
    end,
    n_k,
    num_kv_heads,
    scale_log2,
    softcap_log2,
    window_left,
    window_right,
    stride_q_row,
    stride_q_head,
    stride_k_page,
    stride_k_row,
    stride_k_head,
    stride_v_page,
    stride_v_row,
    stride_v_head,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    GROUP: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of BLOCK_M (query row, head) pairs over the keys from begin to end of a sequence:
    rows `[BLOCK_M, D_V]` and log2-sum-exp2 `[BLOCK_M]`. Long by what it is told."""
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens, heads = rows // GROUP, rows % GROUP
    row_offset = (start_q + tokens).to(tl.int64)
    at_q = row_offset * stride_q_row + (head * GROUP + heads) * stride_q_head
    q = load_rows(q_ptr, at_q, tokens < n_q, HEAD_SIZE, D)

    # Bottom-right aligned: the last query row's diagonal is the last live key.
    diagonal = n_k - n_q + tokens
    first_diagonal = n_k - n_q + row_block * BLOCK_M // GROUP
    last_token = tl.minimum((row_block * BLOCK_M + BLOCK_M - 1) // GROUP, n_q - 1)
    # Keys below `full` are seen by every row and need no mask.
    full = end
    if BOUND_RIGHT:
        end = tl.minimum(end, n_k - n_q + last_token + window_right + 1)
        full = tl.minimum(full, first_diagonal + window_right + 1)
    if BOUND_LEFT:
        begin = tl.maximum(begin, (first_diagonal - window_left) // BLOCK_N * BLOCK_N)
        full = begin
    full = begin + tl.maximum(full - begin, 0) // BLOCK_N * BLOCK_N

    if k_descale_ptr is not None:  # a factor of all logits of the sequence
        scale_log2 *= tl.load(k_descale_ptr + seq * num_kv_heads + head)
    bias = None
    if first_key_bias_ptr is not None:
        bias = tl.load(first_key_bias_ptr + seq * num_kv_heads + head) * 1.4426950408889634
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D_V), tl.float32)
    for masked in tl.static_range(2):
        row_max, row_sum, acc = _attend(
            q,
            row_max,
            row_sum,
            acc,
            k_ptr + head * stride_k_head,
            v_ptr + head * stride_v_head,
            block_table_ptr,
            start,
            full if masked else begin,
            end if masked else full,
            n_k,
            diagonal,
            bias,
            scale_log2,
            softcap_log2,
            window_left,
            window_right,
            stride_k_page,
            stride_k_row,
            stride_v_page,
            stride_v_row,
            PAGE_SIZE,
            HEAD_SIZE,
            HEAD_SIZE_V,
            D,
            D_V,
            BOUND_LEFT,
            BOUND_RIGHT,
            SOFTCAP,
            masked,
            BLOCK_N,
        )

    saw_none = row_sum == 0.0
    result = acc / tl.where(saw_none, 1.0, row_sum)[:, None]
    if v_descale_ptr is not None:
        result *= tl.load(v_descale_ptr + seq * num_kv_heads + head)
    lse = tl.where(saw_none, -float("inf"), row_max + tl.log2(row_sum))
    return result, lse


@triton.jit
def load_sinks(sinks_ptr, seq, heads, sink_rows, num_heads):
    """Sinks of some heads of a sequence, log2."""
    sinks = tl.load(sinks_ptr + seq % sink_rows * num_heads + heads)
    return sinks.to(tl.float32) * 1.4426950408889634


@triton.jit
def _beside_sink(lse, sink):
    """What the keys have of a softmax that has a sink too, and the log2-sum-exp2 of all; both
    arguments are logarithms to base 2."""
    top = tl.maximum(lse, sink)
    shift = tl.where(top == -float("inf"), 0.0, top)
    of_keys = tl.exp2(lse - shift)
    total = of_keys + tl.exp2(sink - shift)
    is_empty = total == 0.0
    share = of_keys / tl.where(is_empty, 1.0, total)
    return share, tl.where(is_empty, -float("inf"), shift + tl.log2(total))


@triton.jit
def store_result(
    out_ptr,  # [total_q, num_heads, d_v]
    lse_ptr,  # [num_heads, total_q], natural log, or None
    sinks,  # log2, or None
    result,
    lse,  # log2
    row_offset,
    heads,
    live_rows,
    total_q,
    stride_out_row,
    stride_out_head,
    HEAD_SIZE_V: tl.constexpr,
    D_V: tl.constexpr,
):
    """Rows that are ready but for their sinks, where the caller wants them."""
    if sinks is not None:
        share, lse = _beside_sink(lse, sinks)
        result *= share[:, None]
    at_out = row_offset * stride_out_row + heads * stride_out_head
    store_rows(out_ptr, at_out, result, live_rows, HEAD_SIZE_V, D_V)
    if lse_ptr is not None:
        tl.store(lse_ptr + heads * total_q + row_offset, lse * 0.6931471805599453, mask=live_rows)


@triton.jit(
    do_not_specialize=[
        "max_blocks",
        "max_keys",
        "num_rows",
        "num_kv_heads",
        "num_row_blocks",
        "split_size",
        "sink_rows",
    ],
    do_not_specialize_on_alignment=[*LENGTHS, *OF_HEADS],
    launch_metadata=profiling.decode_split,
)
def _split_kernel(
    q_ptr,  # [total_q, num_heads, d]
    k_ptr,  # [total_k, num_kv_heads, d] or pages
    v_ptr,  # [total_k, num_kv_heads, d_v] or pages
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_k_ptr,
    block_table_ptr,
    first_key_bias_ptr,  # [num_seqs, num_kv_heads], natural log, or None
    sinks_ptr,  # DIRECT: [sink_rows, num_heads], natural log, or None; else None
    k_descale_ptr,  # [num_seqs, num_kv_heads] where K is fp8, or None
    v_descale_ptr,
    out_ptr,  # DIRECT: [total_q, num_heads, d_v]; else fp32 [num_splits, num_rows, d_v]
    lse_ptr,  # DIRECT: [num_heads, total_q], natural log, or None; else log2 [num_splits, num_rows]
    scale_log2,  # softmax_scale * log2(e); with a softcap, softmax_scale * 2 * log2(e) / softcap
    softcap_log2,  # softcap * log2(e)
    window_left,
    window_right,
    max_blocks,
    max_keys,  # a sequence can have: no length is believed beyond it
    num_rows,  # total_q * num_heads
    num_kv_heads,
    num_row_blocks,
    split_size,
    sink_rows,
    stride_q_row,
    stride_q_head,
    stride_k_page,
    stride_k_row,
    stride_k_head,
    stride_v_page,
    stride_v_row,
    stride_v_head,
    stride_out_row,
    stride_out_head,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    GROUP: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M (query row, head) pairs of one KV head over one split of its sequence's keys.

    The grid is made for the capacity; what lies behind the live length exits at once. Splits are
    its slow axis: heads that share memory pages run together, and idle programs come last.

    Longer than 100 lines by its 45 arguments and their way to attend_rows.
    """
    split = tl.program_id(1)
    head, rest = (tl.program_id(0) % num_kv_heads).to(tl.int64), tl.program_id(0) // num_kv_heads
    row_block, seq = rest % num_row_blocks, (rest // num_row_blocks).to(tl.int64)
    num_heads = num_kv_heads * GROUP
    start_q = tl.load(cu_seqlens_q_ptr + seq)
    n_q = tl.load(cu_seqlens_q_ptr + seq + 1) - start_q
    PAGED: tl.constexpr = block_table_ptr is not None
    n_k = live_keys(seq, cu_seqlens_k_ptr, seqused_k_ptr, max_keys, PAGED)
    begin = split * split_size
    end = tl.minimum(begin + split_size, n_k)

    if (row_block * BLOCK_M < n_q * GROUP) & ((begin < n_k) | DIRECT):
        start = sequence_start(seq, cu_seqlens_k_ptr, block_table_ptr, max_blocks)
        result, lse = attend_rows(
            q_ptr,
            k_ptr,
            v_ptr,
            block_table_ptr,
            first_key_bias_ptr,
            k_descale_ptr,
            v_descale_ptr,
            seq,
            head,
            row_block,
            start_q,
            n_q,
            start,
            begin,
            end,
            n_k,
            num_kv_heads,
            scale_log2,
            softcap_log2,
            window_left,
            window_right,
            stride_q_row,
            stride_q_head,
            stride_k_page,
            stride_k_row,
            stride_k_head,
            stride_v_page,
            stride_v_row,
            stride_v_head,
            PAGE_SIZE,
            HEAD_SIZE,
            HEAD_SIZE_V,
            D,
            D_V,
            GROUP,
            BOUND_LEFT,
            BOUND_RIGHT,
            SOFTCAP,
            BLOCK_M,
            BLOCK_N,
        )
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        tokens, heads = rows // GROUP, head * GROUP + rows % GROUP
        live_rows = tokens < n_q
        row_offset = (start_q + tokens).to(tl.int64)
        if DIRECT:
            sinks = None
            if sinks_ptr is not None:
                sinks = load_sinks(sinks_ptr, seq, heads, sink_rows, num_heads)
            store_result(
                out_ptr,
                lse_ptr,
                sinks,
                result,
                lse,
                row_offset,
                heads,
                live_rows,
                num_rows // num_heads,
                stride_out_row,
                stride_out_head,
                HEAD_SIZE_V,
                D_V,
            )
        else:
            row = split.to(tl.int64) * num_rows + row_offset * num_heads + heads
            store_rows(out_ptr, row * HEAD_SIZE_V, result, live_rows, HEAD_SIZE_V, D_V)
            tl.store(lse_ptr + row, lse, mask=live_rows)


@triton.jit
def combine_row(
    partial_out_ptr,  # fp32 [rows, d_v]
    partial_lse_ptr,  # fp32 [rows], log2
    row,  # of the first part
    stride,  # in rows, from part to part
    num_parts,
    HEAD_SIZE_V: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One row `[D_V]` and its log2-sum-exp2 out of those of its parts, in their order."""
    row_max = tl.full((), -float("inf"), tl.float32)
    row_sum = tl.zeros((), tl.float32)
    acc = tl.zeros((D_V,), tl.float32)
    for start in range(0, num_parts, BLOCK_S):
        parts = start + tl.arange(0, BLOCK_S)
        live = parts < num_parts
        rows = parts.to(tl.int64) * stride + row
        lse = tl.load(partial_lse_ptr + rows, mask=live, other=-float("inf"))
        values = load_rows(partial_out_ptr, rows * HEAD_SIZE_V, live, HEAD_SIZE_V, D_V)
        new_max = tl.maximum(row_max, tl.max(lse, 0))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(lse - shift)
        correction = tl.exp2(row_max - shift)
        acc = acc * correction + tl.sum(weights[:, None] * values, 0)
        row_sum = row_sum * correction + tl.sum(weights, 0)
        row_max = new_max
    saw_none = row_sum == 0.0
    result = acc / tl.where(saw_none, 1.0, row_sum)
    return result, tl.where(saw_none, -float("inf"), row_max + tl.log2(row_sum))


@triton.jit
def store_row(
    out_ptr,  # at the row
    lse_ptr,  # at the row, natural log, or None
    sink,  # log2, or None
    result,
    lse,  # log2
    HEAD_SIZE_V: tl.constexpr,
    D_V: tl.constexpr,
):
    """One row that is ready but for its sink."""
    if sink is not None:
        share, lse = _beside_sink(lse, sink)
        result *= share
    dims = tl.arange(0, D_V)
    tl.store(out_ptr + dims, result.to(out_ptr.dtype.element_ty), mask=dims < HEAD_SIZE_V)
    if lse_ptr is not None:
        tl.store(lse_ptr, lse * 0.6931471805599453)


@triton.jit(
    do_not_specialize=["max_keys", "num_rows", "num_heads", "split_size", "sink_rows"],
    do_not_specialize_on_alignment=[*LENGTHS, "sinks_ptr"],
    launch_metadata=profiling.decode_combine,
)
def _combine_splits_kernel(
    partial_out_ptr,  # fp32 [num_splits, num_rows, d_v]
    partial_lse_ptr,  # fp32 [num_splits, num_rows], log2
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_k_ptr,
    sinks_ptr,  # [sink_rows, num_heads], natural log, or None
    out_ptr,  # [total_q, num_heads, d_v]
    lse_ptr,  # [num_heads, total_q], natural log, or None
    max_keys,
    num_rows,
    num_heads,
    split_size,
    sink_rows,
    stride_out_row,
    stride_out_head,
    HEAD_SIZE_V: tl.constexpr,
    D_V: tl.constexpr,
    PAGED: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One output row out of those of its live splits, in their order."""
    token, seq = tl.program_id(1), (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    start_q = tl.load(cu_seqlens_q_ptr + seq)
    if token < tl.load(cu_seqlens_q_ptr + seq + 1) - start_q:
        n_k = live_keys(seq, cu_seqlens_k_ptr, seqused_k_ptr, max_keys, PAGED)
        num_splits = tl.cdiv(n_k, split_size)
        sink = None
        if sinks_ptr is not None:
            sink = load_sinks(sinks_ptr, seq, head, sink_rows, num_heads)
        q_row = (start_q + token).to(tl.int64)
        result, lse = combine_row(
            partial_out_ptr,
            partial_lse_ptr,
            q_row * num_heads + head,
            num_rows,
            num_splits,
            HEAD_SIZE_V,
            D_V,
            BLOCK_S,
        )
        at_lse = lse_ptr
        if lse_ptr is not None:
            at_lse += head * (num_rows // num_heads) + q_row
        at_out = out_ptr + q_row * stride_out_row + head * stride_out_head
        store_row(at_out, at_lse, sink, result, lse, HEAD_SIZE_V, D_V)
