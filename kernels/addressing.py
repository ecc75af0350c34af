"""Device code that all kernels share: where the rows of a sequence lie, and how many are live.

Rows are packed one sequence behind another, `[total_k, num_kv_heads, d]`, or lie in the pages of a
block table, `[num_blocks, page_size, num_kv_heads, d]`. Offsets are in 64 bits: caches are larger
than 2**31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def sequence_start(seq, cu_seqlens_ptr, block_table_ptr, max_blocks):
    """A sequence's first row in packed memory, or its first entry of the block table."""
    return tl.load(cu_seqlens_ptr + seq) if block_table_ptr is None else seq * max_blocks


@triton.jit
def live_length(seq, cu_seqlens_ptr, seqused_ptr, BOUNDED: tl.constexpr):
    """Live rows of a sequence: all of cu_seqlens; or those used, BOUNDED by these."""
    # Not by an early return: Triton compiles what follows it all the same.
    if seqused_ptr is None:
        length = tl.load(cu_seqlens_ptr + seq + 1) - tl.load(cu_seqlens_ptr + seq)
    elif BOUNDED:
        length = tl.load(cu_seqlens_ptr + seq + 1) - tl.load(cu_seqlens_ptr + seq)
        length = tl.minimum(length, tl.load(seqused_ptr + seq))
    else:
        length = tl.load(seqused_ptr + seq)
    return length


@triton.jit
def pages_of(positions, live, start, block_table_ptr, PAGE_SIZE: tl.constexpr):
    """The pages of a sequence's rows, `[N]` int32; of packed rows, the sequence's start.

    A loop over rows asks for those of its next block and carries them there (`offsets_in`): Triton
    keeps several blocks of rows on their way only if no address waits for a load of the same block.
    """
    if block_table_ptr is None:
        pages = start
    else:
        pages = block_table_ptr + start + positions // PAGE_SIZE
        pages = tl.load(pages, mask=live, other=None if live is None else 0)
    return pages


@triton.jit
def offsets_in(pages, positions, block_table_ptr, stride_page, stride_row, PAGE_SIZE: tl.constexpr):
    """Offsets of a sequence's rows, `[N]` int64, which lie in the pages that `pages_of` gave."""
    if block_table_ptr is None:
        offsets = (pages + positions).to(tl.int64) * stride_row
    else:
        offsets = pages.to(tl.int64) * stride_page
        offsets += (positions % PAGE_SIZE).to(tl.int64) * stride_row
    return offsets


@triton.jit
def row_offsets(
    positions,  # [N], in the sequence
    live,  # [N], or None where all are
    start,  # of the sequence, as sequence_start has it
    block_table_ptr,  # or None
    stride_page,
    stride_row,
    PAGE_SIZE: tl.constexpr,
):
    """Offsets of a sequence's rows, `[N]` int64; of dead ones, any that nobody may follow."""
    pages = pages_of(positions, live, start, block_table_ptr, PAGE_SIZE)
    return offsets_in(pages, positions, block_table_ptr, stride_page, stride_row, PAGE_SIZE)


@triton.jit
def load_rows(x_ptr, offsets, live, HEAD_SIZE: tl.constexpr, D: tl.constexpr):
    """Rows `[N, D]`; 0 where not live (None: all are) and beyond the head size.

    Dead rows may hold anything: as 0 they cannot turn a product into NaN. So may what lies beyond
    the head size, in the next head or the next row. So a head size that is no multiple of 16 bytes
    is read in the pieces that divide it (100 elements of 2 bytes: 8 bytes), even where strides
    would allow more: the last piece of 16 would hold 8 bytes of another row or head. This costs
    more than the pieces: Triton gives decoding and the row pass no such block ahead.
    """
    dims = tl.arange(0, D)
    rows = x_ptr + offsets[:, None] + dims[None, :]
    if D > HEAD_SIZE:
        mask = (dims < HEAD_SIZE)[None, :]
        if live is not None:
            mask = mask & live[:, None]
    else:
        mask = None if live is None else live[:, None]
    return tl.load(rows, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def store_rows(x_ptr, offsets, values, live, HEAD_SIZE: tl.constexpr, D: tl.constexpr):
    """Write the live rows of `[N, D]`, as far as the head size."""
    dims = tl.arange(0, D)
    mask = live[:, None]
    if D > HEAD_SIZE:
        mask = mask & (dims < HEAD_SIZE)[None, :]
    rows = x_ptr + offsets[:, None] + dims[None, :]
    tl.store(rows, values.to(x_ptr.dtype.element_ty), mask=mask)
