"""Device code of decode.py: attention over one split of the keys, and the combination of splits."""

import triton
import triton.language as tl


@triton.jit
def _load_rows(
    x_ptr,  # at the KV head
    block_table_ptr,  # at the sequence's row, or None
    keys,  # [BLOCK_N], positions in the sequence
    live,  # [BLOCK_N], or None where all are
    start_k,
    stride_page,
    stride_row,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
):
    """Rows of one head `[BLOCK_N, D]`, 0 where not live and beyond the head size."""
    if block_table_ptr is None:
        offsets = (start_k + keys).to(tl.int64) * stride_row
    else:
        if live is None:
            page = tl.load(block_table_ptr + keys // PAGE_SIZE).to(tl.int64)
        else:
            page = tl.load(block_table_ptr + keys // PAGE_SIZE, mask=live, other=0).to(tl.int64)
        offsets = page * stride_page + (keys % PAGE_SIZE).to(tl.int64) * stride_row
    dims = tl.arange(0, D)
    rows = x_ptr + offsets[:, None] + dims[None, :]
    # Dead rows may hold anything: as 0 they cannot turn a product into NaN.
    if D > HEAD_SIZE:
        inside = (dims < HEAD_SIZE)[None, :]
        if live is not None:
            inside = inside & live[:, None]
        return tl.load(rows, mask=inside, other=0.0)
    if live is not None:
        return tl.load(rows, mask=live[:, None], other=0.0)
    return tl.load(rows)


@triton.jit
def _live_keys(seq, cu_seqlens_k_ptr, seqused_k_ptr, max_keys, PAGED: tl.constexpr):
    """(start, live keys) of a sequence: never more keys than it has memory for."""
    start_k = tl.load(cu_seqlens_k_ptr + seq)
    n_k = tl.load(cu_seqlens_k_ptr + seq + 1) - start_k
    if seqused_k_ptr is not None:
        used = tl.load(seqused_k_ptr + seq)
        n_k = used if PAGED else tl.minimum(n_k, used)
    return start_k, tl.minimum(n_k, max_keys)


# Of lengths, single elements are read: where a layer's part of a tensor starts is no reason to
# compile anew.
LENGTHS = ["cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "seqused_k_ptr"]


@triton.jit(
    do_not_specialize=[
        "max_blocks",
        "max_keys",
        "num_rows",
        "num_kv_heads",
        "num_row_blocks",
        "split_size",
    ],
    do_not_specialize_on_alignment=[*LENGTHS, "first_key_bias_ptr"],
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
    """
    split = tl.program_id(1)
    head, rest = (tl.program_id(0) % num_kv_heads).to(tl.int64), tl.program_id(0) // num_kv_heads
    row_block, seq = rest % num_row_blocks, (rest // num_row_blocks).to(tl.int64)
    num_heads = num_kv_heads * GROUP
    start_q = tl.load(cu_seqlens_q_ptr + seq)
    n_q = tl.load(cu_seqlens_q_ptr + seq + 1) - start_q
    PAGED: tl.constexpr = block_table_ptr is not None
    start_k, n_k = _live_keys(seq, cu_seqlens_k_ptr, seqused_k_ptr, max_keys, PAGED)
    begin = split * split_size
    end = tl.minimum(begin + split_size, n_k)

    if (row_block * BLOCK_M < n_q * GROUP) & ((begin < n_k) | DIRECT):
        if block_table_ptr is not None:
            block_table_ptr += seq * max_blocks
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        tokens, heads = rows // GROUP, rows % GROUP
        live_rows = tokens < n_q
        row_offset = (start_q + tokens).to(tl.int64)
        dims = tl.arange(0, D)
        q_mask = live_rows[:, None]
        if D > HEAD_SIZE:
            q_mask = q_mask & (dims < HEAD_SIZE)[None, :]
        q_row = row_offset * stride_q_row + (head * GROUP + heads) * stride_q_head
        q = tl.load(q_ptr + q_row[:, None] + dims[None, :], mask=q_mask, other=0.0)

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

        k_ptr += head * stride_k_head
        v_ptr += head * stride_v_head
        if first_key_bias_ptr is not None:
            bias = tl.load(first_key_bias_ptr + seq * num_kv_heads + head) * 1.4426950408889634
        row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, D_V), tl.float32)
        for masked in tl.static_range(2):
            for start in range(full if masked else begin, end if masked else full, BLOCK_N):
                keys = start + tl.arange(0, BLOCK_N)
                k = _load_rows(
                    k_ptr,
                    block_table_ptr,
                    keys,
                    keys < n_k if masked else None,
                    start_k,
                    stride_k_page,
                    stride_k_row,
                    PAGE_SIZE,
                    HEAD_SIZE,
                    D,
                )
                logits = tl.dot(q, tl.trans(k), input_precision="ieee")
                if SOFTCAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1), finite at both ends
                    logits = 1.0 - 2.0 / (tl.exp2(logits * scale_log2) + 1.0)
                if first_key_bias_ptr is not None:  # costs no instruction more but the select
                    addend = tl.where(keys == 0, bias, 0.0)[None, :]
                    logits = tl.fma(logits, softcap_log2 if SOFTCAP else scale_log2, addend)
                else:
                    logits = logits * (softcap_log2 if SOFTCAP else scale_log2)
                if masked:
                    seen = (keys < n_k)[None, :]
                    if BOUND_RIGHT:
                        seen = seen & (keys[None, :] <= diagonal[:, None] + window_right)
                    if BOUND_LEFT:
                        seen = seen & (keys[None, :] >= diagonal[:, None] - window_left)
                    logits = tl.where(seen, logits, -float("inf"))
                new_max = tl.maximum(row_max, tl.max(logits, 1))
                shift = new_max
                if masked:  # a row that has seen no key yet: exp2(-inf - 0) is 0, not NaN
                    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
                weights = tl.exp2(logits - shift[:, None])  # [BLOCK_M, BLOCK_N]
                correction = tl.exp2(row_max - shift)
                row_sum = row_sum * correction + tl.sum(weights, 1)
                row_max = new_max
                v = _load_rows(
                    v_ptr,
                    block_table_ptr,
                    keys,
                    keys < n_k if masked else None,
                    start_k,
                    stride_v_page,
                    stride_v_row,
                    PAGE_SIZE,
                    HEAD_SIZE_V,
                    D_V,
                )
                acc = acc * correction[:, None]
                acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")

        saw_none = row_sum == 0.0
        result = acc / tl.where(saw_none, 1.0, row_sum)[:, None]
        lse = tl.where(saw_none, -float("inf"), row_max + tl.log2(row_sum))
        dims_v = tl.arange(0, D_V)
        out_mask = live_rows[:, None]
        if D_V > HEAD_SIZE_V:
            out_mask = out_mask & (dims_v < HEAD_SIZE_V)[None, :]
        if DIRECT:
            out_row = row_offset * stride_out_row + (head * GROUP + heads) * stride_out_head
            target = out_ptr + out_row[:, None] + dims_v[None, :]
            tl.store(target, result.to(out_ptr.dtype.element_ty), mask=out_mask)
            if lse_ptr is not None:
                total_q = num_rows // num_heads
                natural = lse * 0.6931471805599453
                tl.store(
                    lse_ptr + (head * GROUP + heads) * total_q + row_offset, natural, mask=live_rows
                )
        else:
            row = split.to(tl.int64) * num_rows + row_offset * num_heads + head * GROUP + heads
            target = out_ptr + row[:, None] * HEAD_SIZE_V + dims_v[None, :]
            tl.store(target, result, mask=out_mask)
            tl.store(lse_ptr + row, lse, mask=live_rows)


@triton.jit(
    do_not_specialize=["max_keys", "num_rows", "num_heads", "split_size"],
    do_not_specialize_on_alignment=LENGTHS,
)
def _combine_kernel(
    partial_out_ptr,  # fp32 [num_splits, num_rows, d_v]
    partial_lse_ptr,  # fp32 [num_splits, num_rows], log2
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_k_ptr,
    out_ptr,  # [total_q, num_heads, d_v]
    lse_ptr,  # [num_heads, total_q], natural log, or None
    max_keys,
    num_rows,
    num_heads,
    split_size,
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
        _, n_k = _live_keys(seq, cu_seqlens_k_ptr, seqused_k_ptr, max_keys, PAGED)
        live = tl.cdiv(n_k, split_size)
        q_row = (start_q + token).to(tl.int64)
        row = q_row * num_heads + head
        dims = tl.arange(0, D_V)
        row_max = tl.full((), -float("inf"), tl.float32)
        row_sum = tl.zeros((), tl.float32)
        acc = tl.zeros((D_V,), tl.float32)
        for start in range(0, live, BLOCK_S):
            splits = start + tl.arange(0, BLOCK_S)
            rows = splits.to(tl.int64) * num_rows + row
            lse = tl.load(partial_lse_ptr + rows, mask=splits < live, other=-float("inf"))
            part_mask = (splits < live)[:, None] & (dims < HEAD_SIZE_V)[None, :]
            part = partial_out_ptr + rows[:, None] * HEAD_SIZE_V + dims[None, :]
            values = tl.load(part, mask=part_mask, other=0.0)  # [BLOCK_S, D_V]
            new_max = tl.maximum(row_max, tl.max(lse, 0))
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)
            weights = tl.exp2(lse - shift)
            correction = tl.exp2(row_max - shift)
            acc = acc * correction + tl.sum(weights[:, None] * values, 0)
            row_sum = row_sum * correction + tl.sum(weights, 0)
            row_max = new_max
        saw_none = row_sum == 0.0
        result = acc / tl.where(saw_none, 1.0, row_sum)
        target = out_ptr + q_row * stride_out_row + head * stride_out_head + dims
        tl.store(target, result.to(out_ptr.dtype.element_ty), mask=dims < HEAD_SIZE_V)
        if lse_ptr is not None:
            total_q = num_rows // num_heads
            lse_2 = tl.where(saw_none, -float("inf"), row_max + tl.log2(row_sum))
            tl.store(lse_ptr + head * total_q + q_row, lse_2 * 0.6931471805599453)
