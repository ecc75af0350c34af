"""Device code of schedule.py: key blocks of all sequences in one list, cut evenly over a grid.

A layer's table, `[num_seqs + 1 + num_programs + 1]` int32: where each sequence's blocks begin in
the list, and their number; then the sequence that holds each program's first block, and num_seqs.
A program has `share` blocks, so it may end one sequence and begin the next. What it has of one is
a piece, number program + seq: it grows along the list, those of a sequence come in one run, and
there are fewer than programs and sequences together.
"""

import inspect

import triton
import triton.language as tl

from . import profiling
from .addressing import sequence_start, store_rows
from .decode_kernels import (
    LENGTHS,
    OF_HEADS,
    attend_rows,
    combine_row,
    live_keys,
    load_sinks,
    store_result,
    store_row,
)

#: Triton 3.4 cannot be told to leave over the loop what all sequences have in common.
IS_SUPPORTED = "disable_licm" in inspect.signature(tl.range.__init__).parameters


@triton.jit
def _share(num_blocks, num_programs, min_share):
    """Blocks of each program, of so many in all; the last ones may have fewer, or none."""
    return tl.maximum(tl.cdiv(num_blocks, num_programs), min_share)


@triton.jit
def _blocks(
    seqs,  # [SEQS]
    num_seqs,
    cu_seqlens_k_ptr,
    seqused_k_ptr,
    num_new,
    max_keys,
    PAGED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Key blocks of some sequences, once num_new keys more are in; 0 behind the last sequence."""
    live = seqs < num_seqs
    keys = max_keys
    if not PAGED or seqused_k_ptr is None:
        keys = tl.load(cu_seqlens_k_ptr + seqs + 1, mask=live, other=0)
        keys = tl.minimum(keys - tl.load(cu_seqlens_k_ptr + seqs, mask=live, other=0), max_keys)
    if seqused_k_ptr is not None:
        used = tl.load(seqused_k_ptr + seqs, mask=live, other=0)
        keys = tl.minimum(used + num_new, keys)
    return tl.where(live, tl.cdiv(tl.maximum(keys, 0), BLOCK_N), 0)


@triton.jit(
    do_not_specialize=["num_seqs", "num_programs", "min_share", "num_new", "max_keys"],
    do_not_specialize_on_alignment=["cu_seqlens_k_ptr", "seqused_k_ptr", "schedule_ptr"],
    launch_metadata=profiling.schedule,
)
def _schedule_kernel(
    cu_seqlens_k_ptr,  # [num_layers, num_seqs + 1], or None
    seqused_k_ptr,  # [num_layers, num_seqs], or None
    schedule_ptr,  # [num_layers, num_seqs + 1 + num_programs + 1]
    num_seqs,
    num_programs,
    min_share,
    num_new,
    max_keys,
    stride_cu_seqlens_k,
    stride_seqused_k,
    stride_schedule,
    PAGED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEQS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """The sequences of PROGRAMS programs of one layer; its first program writes all beginnings."""
    chunk, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if cu_seqlens_k_ptr is not None:
        cu_seqlens_k_ptr += layer * stride_cu_seqlens_k
    if seqused_k_ptr is not None:
        seqused_k_ptr += layer * stride_seqused_k
    schedule_ptr += layer * stride_schedule
    total = tl.zeros((), tl.int32)
    for start in range(0, num_seqs, SEQS):
        seqs = start + tl.arange(0, SEQS)
        blocks = _blocks(
            seqs, num_seqs, cu_seqlens_k_ptr, seqused_k_ptr, num_new, max_keys, PAGED, BLOCK_N
        )
        total += tl.sum(blocks, 0)
    programs = chunk * PROGRAMS + tl.arange(0, PROGRAMS)
    first_blocks = programs * _share(total, num_programs, min_share)
    before = tl.zeros((PROGRAMS,), tl.int32)  # sequences that end before a program's first block
    end = tl.zeros((), tl.int32)
    for start in range(0, num_seqs, SEQS):
        seqs = start + tl.arange(0, SEQS)
        blocks = _blocks(
            seqs, num_seqs, cu_seqlens_k_ptr, seqused_k_ptr, num_new, max_keys, PAGED, BLOCK_N
        )
        ends = end + tl.cumsum(blocks, 0)
        if chunk == 0:
            tl.store(schedule_ptr + seqs, ends - blocks, mask=seqs < num_seqs)
        is_before = (ends[None, :] <= first_blocks[:, None]) & (seqs < num_seqs)[None, :]
        before += tl.sum(is_before.to(tl.int32), 1)
        end += tl.sum(blocks, 0)
    if chunk == 0:
        tl.store(schedule_ptr + num_seqs, total)
    before = tl.where(programs < num_programs, before, num_seqs)
    tl.store(schedule_ptr + num_seqs + 1 + programs, before, mask=programs <= num_programs)


@triton.jit(
    do_not_specialize=[
        "max_blocks",
        "max_keys",
        "total_q",
        "num_seqs",
        "num_kv_heads",
        "num_row_blocks",
        "num_programs",
        "min_share",
        "rows_per_piece",
        "sink_rows",
    ],
    do_not_specialize_on_alignment=[*LENGTHS, *OF_HEADS, "schedule_ptr"],
    launch_metadata=profiling.decode_scheduled,
)
def _scheduled_kernel(
    q_ptr,  # [total_q, num_heads, d]
    k_ptr,  # [total_k, num_kv_heads, d] or pages
    v_ptr,  # [total_k, num_kv_heads, d_v] or pages
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seqused_k_ptr,
    block_table_ptr,
    first_key_bias_ptr,  # [num_seqs, num_kv_heads], natural log, or None
    sinks_ptr,  # [sink_rows, num_heads], natural log, or None
    k_descale_ptr,  # [num_seqs, num_kv_heads] where K is fp8, or None
    v_descale_ptr,
    schedule_ptr,
    out_ptr,  # [total_q, num_heads, d_v]
    lse_ptr,  # [num_heads, total_q], natural log, or None
    partial_out_ptr,  # fp32 [pieces, num_kv_heads, rows_per_piece, d_v]
    partial_lse_ptr,  # fp32 [pieces, num_kv_heads, rows_per_piece], log2
    scale_log2,
    softcap_log2,
    window_left,
    window_right,
    max_blocks,
    max_keys,
    total_q,
    num_seqs,
    num_kv_heads,
    num_row_blocks,
    num_programs,
    min_share,
    rows_per_piece,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M (query row, head) pairs of one KV head over the program's share of the key blocks.

    A sequence that it has whole is written where it belongs; what it has of others, as pieces.
    """
    part, program = tl.program_id(0), tl.program_id(1)
    head, row_block = (part % num_kv_heads).to(tl.int64), part // num_kv_heads
    PAGED: tl.constexpr = block_table_ptr is not None
    total = tl.load(schedule_ptr + num_seqs)
    share = _share(total, num_programs, min_share)
    first_block = program * share
    last_block = tl.minimum(first_block + share, total)
    sequences = schedule_ptr + num_seqs + 1 + program
    # Up to the sequence that the next program begins with, which may be this one's last too.
    last_seq = tl.minimum(tl.load(sequences + 1), num_seqs - 1)
    # Held in registers over the loop, what all sequences have in common would not fit.
    for this in tl.range(tl.load(sequences), last_seq + 1, disable_licm=True):
        seq_begin, seq_end = tl.load(schedule_ptr + this), tl.load(schedule_ptr + this + 1)
        begin, end = tl.maximum(seq_begin, first_block), tl.minimum(seq_end, last_block)
        seq = tl.cast(this, tl.int64)
        start_q = tl.load(cu_seqlens_q_ptr + seq)
        n_q = tl.load(cu_seqlens_q_ptr + seq + 1) - start_q
        if (begin < end) & (row_block * BLOCK_M < n_q * GROUP):
            n_k = live_keys(seq, cu_seqlens_k_ptr, seqused_k_ptr, max_keys, PAGED)
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
                sequence_start(seq, cu_seqlens_k_ptr, block_table_ptr, max_blocks),
                (begin - seq_begin) * BLOCK_N,
                tl.minimum((end - seq_begin) * BLOCK_N, n_k),
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
            if (begin == seq_begin) & (end == seq_end):
                sinks = None
                if sinks_ptr is not None:
                    sinks = load_sinks(sinks_ptr, seq, heads, sink_rows, num_kv_heads * GROUP)
                store_result(
                    out_ptr,
                    lse_ptr,
                    sinks,
                    result,
                    lse,
                    (start_q + tokens).to(tl.int64),
                    heads,
                    tokens < n_q,
                    total_q,
                    stride_out_row,
                    stride_out_head,
                    HEAD_SIZE_V,
                    D_V,
                )
            else:
                row = ((program + seq) * num_kv_heads + head) * rows_per_piece + rows
                live_rows = (tokens < n_q) & (rows < rows_per_piece)
                at_out = row * HEAD_SIZE_V
                store_rows(partial_out_ptr, at_out, result, live_rows, HEAD_SIZE_V, D_V)
                tl.store(partial_lse_ptr + row, lse, mask=live_rows)


@triton.jit(
    do_not_specialize=[
        "total_q",
        "num_seqs",
        "num_kv_heads",
        "num_programs",
        "min_share",
        "rows_per_piece",
        "sink_rows",
    ],
    do_not_specialize_on_alignment=["cu_seqlens_q_ptr", "sinks_ptr", "schedule_ptr"],
    launch_metadata=profiling.decode_combine_pieces,
)
def _combine_pieces_kernel(
    partial_out_ptr,  # fp32 [pieces, num_kv_heads, rows_per_piece, d_v]
    partial_lse_ptr,  # fp32 [pieces, num_kv_heads, rows_per_piece], log2
    cu_seqlens_q_ptr,
    sinks_ptr,  # [sink_rows, num_heads], natural log, or None
    schedule_ptr,
    out_ptr,  # [total_q, num_heads, d_v]
    lse_ptr,  # [num_heads, total_q], natural log, or None
    total_q,
    num_seqs,
    num_kv_heads,
    num_programs,
    min_share,
    rows_per_piece,
    sink_rows,
    stride_out_row,
    stride_out_head,
    HEAD_SIZE_V: tl.constexpr,
    D_V: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One output row of a sequence that is no program's alone; of one without keys, 0."""
    num_heads = num_kv_heads * GROUP
    token, seq = tl.program_id(1), (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    begin, end = tl.load(schedule_ptr + seq), tl.load(schedule_ptr + seq + 1)
    share = _share(tl.load(schedule_ptr + num_seqs), num_programs, min_share)
    first = begin // share
    num_pieces = tl.where(begin < end, (end - 1) // share - first + 1, 0)
    start_q = tl.load(cu_seqlens_q_ptr + seq)
    if (num_pieces != 1) & (token < tl.load(cu_seqlens_q_ptr + seq + 1) - start_q):
        row = (first + seq) * num_kv_heads + head // GROUP
        sink = None
        if sinks_ptr is not None:
            sink = load_sinks(sinks_ptr, seq, head, sink_rows, num_heads)
        result, lse = combine_row(
            partial_out_ptr,
            partial_lse_ptr,
            row * rows_per_piece + token * GROUP + head % GROUP,
            num_kv_heads * rows_per_piece,
            num_pieces,
            HEAD_SIZE_V,
            D_V,
            BLOCK_S,
        )
        q_row = (start_q + token).to(tl.int64)
        at_lse = lse_ptr
        if lse_ptr is not None:
            at_lse += head * total_q + q_row
        at_out = out_ptr + q_row * stride_out_row + head * stride_out_head
        store_row(at_out, at_lse, sink, result, lse, HEAD_SIZE_V, D_V)
