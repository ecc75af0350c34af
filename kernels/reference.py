"""The specification of the kernels: the same functions in plain fp32 torch, on any device.

Each function here has its Triton twin of the same name and signature in `kernels/`; the tests hold
the twins to these. Clarity first: these loop over sequences (never over tokens), sync, and
materialise what the kernels never do. Steps of the recipe are those of docs/recipe.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class PostVisionStats(NamedTuple):
    """What the post-vision query rows say about the keys of one layer.

    scores: `[num_kv_heads, total_k]` fp32, ψ: the attention that each key receives from the
        query rows, summed over rows and averaged over the query heads of its KV head, or otherwise
        reduced. 0 for rows that belong to no live key.
    retained: `[num_seqs, num_heads]` int64, the entries that pass the ThresholdFilter.
    visible: `[num_seqs]` int64, the causally visible entries of one head; sparsity (eq. 2) is
        γ' = 1 - retained / visible.
    """

    scores: Tensor
    retained: Tensor
    visible: Tensor


class Selection(NamedTuple):
    """Kept positions of every segment, packed; a segment is one (layer, sequence, KV head).

    indices: `[total_kept]` int32, positions within the sequence, ascending in each segment.
        Entries behind the last segment are undefined.
    cu_kept: `[num_segments + 1]` int32, where each segment starts; layer-major, then sequence,
        then KV head.
    """

    indices: Tensor
    cu_kept: Tensor


def post_vision_stats(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    threshold: float = 0.01,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    row_weights: Tensor | None = None,
    row_reduction: str = "sum",
    group_reduction: str = "mean",
) -> PostVisionStats:
    """Sparsity counts (eq. 1 and 2) and token scores ψ (recipe step 4) of one layer.

    The causal mask is aligned bottom-right: the last query row sees every key of its sequence.
    An entry passes the filter when its logit is within ln(threshold) of its row's maximum.
    A left-padded batch is expressed by giving each run of pads a sequence of its own that has no
    query rows.

    Args:
        q: `[total_q, num_heads, d]`, the post-vision rows only, packed, after RoPE.
        k: `[total_k, num_kv_heads, d]`, or pages `[num_blocks, page_size, num_kv_heads, d]`.
        cu_seqlens_q, cu_seqlens_k: `[num_seqs + 1]` int32. With pages, cu_seqlens_k places the
            sequences in `scores` (width num_seqs * max_seqlen_k) and bounds their lengths.
        max_seqlen_q, max_seqlen_k: host upper bounds of the lengths.
        softmax_scale: default 1 / sqrt(d).
        threshold: p of eq. 1.
        seqused_k: `[num_seqs]` int32, live keys of each sequence; default all.
        block_table: `[num_seqs, max_blocks]` int32, the pages of each sequence in order.
        row_weights: `[total_q]` fp32, at least 0: what each row's attention counts in the scores.
        row_reduction: "sum" or "max", of a key's attention over the rows of a query head.
        group_reduction: "mean" or "max", of that over the query heads of a KV head.

    Cost: O(total_q * total_k) time in two passes over k; no total_q x total_k matrix in memory
    in the Triton twin.
    """
    num_heads, d = q.shape[1:]
    num_kv_heads = k.shape[-2]
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    num_seqs = len(starts_q) - 1
    total_k = k.shape[0] if block_table is None else num_seqs * max_seqlen_k
    scores = torch.zeros(num_kv_heads, total_k, dtype=torch.float32, device=q.device)
    retained = torch.zeros(num_seqs, num_heads, dtype=torch.int64, device=q.device)
    visible = torch.zeros(num_seqs, dtype=torch.int64, device=q.device)
    for i, (length_k, rows) in enumerate(_live_rows(cu_seqlens_k, seqused_k, block_table, k)):
        q_i = q[starts_q[i] : starts_q[i + 1]].float()  # [n_q, H, d]
        if len(q_i) == 0 or length_k == 0:
            continue
        k_i = rows(k).float().repeat_interleave(num_heads // num_kv_heads, 1)  # [n_k, H, d]
        logits = torch.einsum("qhd,khd->hqk", q_i, k_i) * scale
        mask = _causal(len(q_i), length_k, q.device)
        logits = logits.masked_fill(~mask, -math.inf)
        row_max = logits.amax(-1, keepdim=True)
        passes = mask & (logits - row_max >= math.log(threshold))
        attention = logits.softmax(-1).masked_fill(~mask, 0.0)  # rows that see no key: 0, not NaN
        if row_weights is not None:
            attention = attention * row_weights[starts_q[i] : starts_q[i + 1], None]
        column = attention.sum(1) if row_reduction == "sum" else attention.amax(1)
        column = column.view(num_kv_heads, -1, length_k)
        column = column.mean(1) if group_reduction == "mean" else column.amax(1)
        scores[:, starts_k[i] : starts_k[i] + length_k] = column
        retained[i] = passes.sum((1, 2))
        visible[i] = mask.sum()
    return PostVisionStats(scores, retained, visible)


def select_tokens(
    scores: Tensor,
    cu_seqlens: Tensor,
    keep: Tensor,
    recent: Tensor,
    *,
    max_seqlen: int,
    total_kept: int | None = None,
) -> Selection:
    """Keep the `recent` last tokens of each sequence and the Top-K of the rest (recipe step 5).

    Ties go to the lower position; -0.0 equals 0.0. The result is the same on every run.

    Args:
        scores: `[..., num_kv_heads, total_k]` fp32 without NaN; leading dimensions are layers.
        cu_seqlens: `[num_seqs + 1]` int32, where the sequences lie in total_k.
        keep: `[..., num_seqs]` int32 on the device of scores, tokens to keep, recent ones
            included; clamped to the sequence's length.
        recent: like keep; clamped to keep.
        max_seqlen: host upper bound of the lengths.
        total_kept: host upper bound of Σ keep * num_kv_heads, the size of `indices`; default
            scores.numel(). Budgets are exact, so callers know it without a sync.
    """
    *leading, num_kv_heads, _ = scores.shape
    starts = cu_seqlens.tolist()
    num_seqs = len(starts) - 1
    flat = scores.reshape(math.prod(leading), num_kv_heads, scores.shape[-1])
    keep_counts = keep.reshape(-1, num_seqs).tolist()
    recent_counts = recent.reshape(-1, num_seqs).tolist()
    parts, counts = [], []
    for layer in range(len(flat)):
        for i in range(num_seqs):
            length = starts[i + 1] - starts[i]
            n = max(0, min(keep_counts[layer][i], length))
            window = max(0, min(recent_counts[layer][i], n))
            segment = flat[layer, :, starts[i] : starts[i + 1] - window]  # [H_kv, length - window]
            order = (segment + 0.0).sort(dim=-1, descending=True, stable=True).indices
            top = order[:, : n - window].sort(-1).values
            tail = torch.arange(length - window, length, device=scores.device)
            parts.append(torch.cat([top, tail.expand(num_kv_heads, -1)], -1).reshape(-1))
            counts += [n] * num_kv_heads
    packed = torch.cat(parts).int()
    size = scores.numel() if total_kept is None else total_kept
    if size < len(packed):
        raise ValueError(f"total_kept: got {total_kept}, expected at least {len(packed)}")
    indices = torch.zeros(size, dtype=torch.int32, device=scores.device)
    indices[: len(packed)] = packed
    cu_kept = torch.tensor([0, *counts], device=scores.device).cumsum(0).int()
    return Selection(indices, cu_kept)


def compact_kv(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    indices: Tensor,
    cu_kept: Tensor,
    out_k: Tensor,
    out_v: Tensor,
    cu_seqlens_out: Tensor,
    *,
    max_kept: int,
    block_table: Tensor | None = None,
    out_block_table: Tensor | None = None,
) -> None:
    """Move the kept rows of one layer's K and V to the front of their segments of a ragged pool.

    Segment s = (sequence, KV head) of the sources becomes varlen sequence s of the pool. Rows of
    the pool behind a segment's kept rows (its head room) are not written.

    Args:
        k, v: `[total_k, num_kv_heads, d]`, or pages `[num_blocks, page_size, num_kv_heads, d]`.
            The head sizes of k and v may differ.
        cu_seqlens_k: `[num_seqs + 1]` int32; unused for pages.
        indices, cu_kept: this layer's part of a Selection: cu_kept is
            `[num_seqs * num_kv_heads + 1]` and may start above 0.
        out_k, out_v: `[capacity, 1, d]`, or pages `[num_blocks, page_size, 1, d]`; must not
            overlap the sources (see compact_kv_).
        cu_seqlens_out: `[num_seqs * num_kv_heads + 1]` int32, segment starts; unused for pages.
        max_kept: host upper bound of the kept tokens of a segment.
        block_table: `[num_seqs, max_blocks]` int32, pages of the sources.
        out_block_table: `[num_seqs * num_kv_heads, max_blocks]` int32, pages of the pool.
    """
    num_kv_heads = k.shape[-2]
    bounds = cu_kept.tolist()
    for s in range(len(bounds) - 1):
        i, h = divmod(s, num_kv_heads)
        kept = indices[bounds[s] : bounds[s + 1]].long()
        source = _rows(kept, i, cu_seqlens_k, block_table, k)
        target = torch.arange(len(kept), device=k.device)
        target = _rows(target, s, cu_seqlens_out, out_block_table, out_k)
        out_k.view(-1, out_k.shape[-1])[target] = k.reshape(-1, *k.shape[-2:])[source, h]
        out_v.view(-1, out_v.shape[-1])[target] = v.reshape(-1, *v.shape[-2:])[source, h]


def compact_kv_(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    indices: Tensor,
    cu_kept: Tensor,
    *,
    max_kept: int,
    block_table: Tensor | None = None,
) -> None:
    """Move the kept rows to the front of their own sequence, in place, each KV head on its own.

    Arguments as for compact_kv. After it, logical row j of (sequence i, KV head h) holds kept
    token j of segment i * num_kv_heads + h; rows behind are unchanged. Needs no second copy.
    """
    num_kv_heads = k.shape[-2]
    bounds = cu_kept.tolist()
    flat_k, flat_v = k.view(-1, *k.shape[-2:]), v.view(-1, *v.shape[-2:])
    for s in range(len(bounds) - 1):
        i, h = divmod(s, num_kv_heads)
        kept = indices[bounds[s] : bounds[s + 1]].long()
        source = _rows(kept, i, cu_seqlens_k, block_table, k)
        target = _rows(torch.arange(len(kept), device=k.device), i, cu_seqlens_k, block_table, k)
        flat_k[target, h] = flat_k[source, h]  # advanced indexing gathers before it scatters
        flat_v[target, h] = flat_v[source, h]


def sum_evicted(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    indices: Tensor,
    cu_kept: Tensor,
    max_seqlen_k: int,
    *,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add up the live rows of one layer's K and V that are not kept, before anything moves.

    Args:
        k, v: `[total_k, num_kv_heads, d]`, or pages `[num_blocks, page_size, num_kv_heads, d]`.
            The head sizes of k and v may differ.
        cu_seqlens_k: `[num_seqs + 1]` int32. Starts alone are used with seqused_k; lengths alone
            with pages, and nothing with both.
        indices, cu_kept: this layer's part of a Selection, ascending in each segment: cu_kept is
            `[num_seqs * num_kv_heads + 1]` and may start above 0.
        max_seqlen_k: host upper bound of the live lengths.
        seqused_k: `[num_seqs]` int32, live rows of each sequence; default all.
        block_table: `[num_seqs, max_blocks]` int32.

    Returns:
        Sums of k and v, `[num_segments, n, d]` and `[num_segments, n, d_v]` fp32, which still have
        to be added up along n (1 here).
    """
    num_kv_heads = k.shape[-2]
    bounds = cu_kept.tolist()
    num_segments = len(bounds) - 1
    lengths = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    sums = [x.new_zeros(num_segments, 1, x.shape[-1], dtype=torch.float32) for x in (k, v)]
    for s in range(num_segments):
        i, h = divmod(s, num_kv_heads)
        evicted = torch.ones(int(lengths[i]), dtype=torch.bool, device=k.device)
        evicted[indices[bounds[s] : bounds[s + 1]].long()] = False
        rows = _rows(evicted.nonzero()[:, 0], i, cu_seqlens_k, block_table, k)
        for x, total in zip((k, v), sums, strict=True):
            total[s] = x.reshape(-1, *x.shape[-2:])[rows, h].float().sum(0)
    return sums[0], sums[1]


def store_means(
    sum_k: Tensor,
    sum_v: Tensor,
    counts: Tensor,
    out_k: Tensor,
    out_v: Tensor,
    cu_seqlens_out: Tensor,
    *,
    out_block_table: Tensor | None = None,
) -> None:
    """Write the mean of what was evicted as the first row of each segment of a ragged pool.

    A segment whose count is 0 evicted nothing, and is left as it is.

    Args:
        sum_k, sum_v: `[num_segments, n, d]` (`d_v` for v) fp32, as `sum_evicted` gives them.
        counts: `[num_segments]` int32, how many rows were added up.
        out_k, out_v: `[capacity, 1, d]`, or pages `[num_blocks, page_size, 1, d]`.
        cu_seqlens_out: `[num_segments + 1]` int32, whose starts alone are used; unused for pages.
        out_block_table: `[num_segments, max_blocks]` int32, pages of the pool.
    """
    segments = counts.nonzero()[:, 0]
    row = _rows(torch.zeros_like(segments), segments, cu_seqlens_out, out_block_table, out_k)
    for sums, out in ((sum_k, out_k), (sum_v, out_v)):
        mean = sums[segments].sum(1) / counts[segments, None]
        out.view(-1, out.shape[-1])[row] = mean.to(out.dtype)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of few query rows over variable-length caches, as `flash_attn_varlen_func` 2.8.

    Args:
        q: `[total_q, num_heads, d]`.
        k, v: `[total_k, num_kv_heads, d]` (`d_v` for v), or pages
            `[num_blocks, page_size, num_kv_heads, d]`.
        cu_seqlens_q, cu_seqlens_k: `[num_seqs + 1]` int32; with pages, cu_seqlens_k only bounds
            the lengths where seqused_k is not given.
        max_seqlen_q, max_seqlen_k: host upper bounds of the lengths.
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

    Returns:
        `[total_q, num_heads, d_v]` of q's dtype. A row that sees no key is 0 with lse -inf.
    """
    total_q, num_heads, d = q.shape
    num_kv_heads, d_v = v.shape[-2:]
    group = num_heads // num_kv_heads
    num_seqs = len(cu_seqlens_q) - 1
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    live = _live_keys(cu_seqlens_k, seqused_k, block_table, k).clamp(0, max_seqlen_k)
    columns = torch.arange(max_seqlen_k, device=q.device)
    rows = columns.expand(num_seqs, -1).clamp(max=(live - 1).clamp(min=0)[:, None])
    seq = torch.arange(num_seqs, device=q.device)[:, None]
    source = _rows(rows, seq, cu_seqlens_k, block_table, k)  # [num_seqs, max_seqlen_k]
    flat_k, flat_v = k.reshape(-1, num_kv_heads, d), v.reshape(-1, num_kv_heads, d_v)
    source = source.clamp(max=len(flat_k) - 1)  # an empty last segment starts one past the end
    # Which sequence a query row is of, and its distance from that sequence's last row.
    ends = cu_seqlens_q[1:].long()
    row_seq = torch.searchsorted(ends, torch.arange(total_q, device=q.device), right=True)
    from_end = ends[row_seq] - 1 - torch.arange(total_q, device=q.device)
    diagonal = (live[row_seq] - 1 - from_end)[:, None]  # [total_q, 1]
    mask = columns < live[row_seq][:, None]
    left, right = window_size[0], 0 if causal else window_size[1]
    if right >= 0:
        mask = mask & (columns <= diagonal + right)
    if left >= 0:
        mask = mask & (columns >= diagonal - left)
    grouped = q.float().view(total_q, num_kv_heads, group, d)
    logits = torch.einsum("qhgd,qkhd->qhgk", grouped, flat_k[source].float()[row_seq]) * scale
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    if first_key_bias is not None:
        if left >= 0:
            raise ValueError(
                f"window_size: got {window_size}, expected no left bound with first_key_bias"
            )
        logits[..., :1] += first_key_bias.view(num_seqs, num_kv_heads, 1, 1)[row_seq]
    logits = logits.masked_fill(~mask[:, None, None], -math.inf)
    weights = logits.softmax(-1).masked_fill(~mask[:, None, None], 0.0)
    # A masked column may hold anything, NaN included: 0 * NaN would not be 0.
    values = flat_v[source].float()[row_seq].masked_fill(~mask[..., None, None], 0.0)
    result = torch.einsum("qhgk,qkhd->qhgd", weights, values).reshape(total_q, num_heads, d_v)
    out = torch.empty_like(result, dtype=q.dtype) if out is None else out
    out.copy_(result)
    if return_softmax_lse:
        return out, logits.logsumexp(-1).reshape(total_q, num_heads).T.contiguous()
    return out


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor,
    *,
    block_table: Tensor | None = None,
) -> None:
    """Write a step's K and V behind the live rows of each sequence and advance the lengths.

    A row without room (at its segment's end, or past its block table) is dropped, and its length
    still advances: the host sees to room before the step.

    Args:
        k, v: `[num_seqs, n, num_kv_heads, d]`, the step's n new rows of every sequence.
        k_cache, v_cache: `[total_k, num_kv_heads, d]`, or pages
            `[num_blocks, page_size, num_kv_heads, d]`; written in place.
        cu_seqlens_k: `[num_seqs + 1]` int32, segment starts, head room included; unused for
            pages.
        seqused_k: `[num_seqs]` int32, live rows; advanced by n in place.
        block_table: `[num_seqs, max_blocks]` int32.
    """
    num_seqs, n = k.shape[:2]
    position = seqused_k.long()[:, None] + torch.arange(n, device=k.device)  # [num_seqs, n]
    if block_table is None:
        fits = position < (cu_seqlens_k[1:] - cu_seqlens_k[:-1])[:, None]
    else:
        fits = position < block_table.shape[1] * k_cache.shape[1]
    seq = torch.arange(num_seqs, device=k.device)[:, None].expand_as(position)
    target = _rows(position[fits], seq[fits], cu_seqlens_k, block_table, k_cache)
    k_cache.view(-1, *k_cache.shape[-2:])[target] = k[fits].to(k_cache.dtype)
    v_cache.view(-1, *v_cache.shape[-2:])[target] = v[fits].to(v_cache.dtype)
    seqused_k += n


def _live_keys(
    cu_seqlens_k: Tensor, seqused_k: Tensor | None, block_table: Tensor | None, k: Tensor
) -> Tensor:
    """`[num_seqs]` int64, never more than a sequence has memory for."""
    capacity = (cu_seqlens_k[1:] - cu_seqlens_k[:-1]).long()
    if block_table is None:
        return capacity if seqused_k is None else capacity.minimum(seqused_k)
    live = capacity if seqused_k is None else seqused_k.long()
    return live.clamp(max=block_table.shape[1] * k.shape[1])


def _rows(
    position: Tensor, seq: int | Tensor, cu_seqlens: Tensor, block_table: Tensor | None, x: Tensor
) -> Tensor:
    """Flat row numbers of logical positions of sequence `seq` in a packed or paged tensor x."""
    if block_table is None:
        return cu_seqlens[seq].long() + position
    page_size = x.shape[1]
    return block_table[seq, position // page_size].long() * page_size + position % page_size


def _live_rows(cu_seqlens_k, seqused_k, block_table, k):
    """For each sequence: its live length, and a function that gathers its rows of a tensor."""
    lengths = cu_seqlens_k[1:] - cu_seqlens_k[:-1] if seqused_k is None else seqused_k
    for i, length in enumerate(lengths.tolist()):
        position = torch.arange(length, device=k.device)

        def rows(x: Tensor, i: int = i, position: Tensor = position) -> Tensor:
            return x.reshape(-1, *x.shape[-2:])[_rows(position, i, cu_seqlens_k, block_table, x)]

        yield length, rows


def _causal(num_rows: int, num_keys: int, device: torch.device) -> Tensor:
    """`[num_rows, num_keys]` bool, bottom-right aligned."""
    offset = num_keys - num_rows
    rows = torch.arange(num_rows, device=device)[:, None]
    return torch.arange(num_keys, device=device) <= rows + offset
