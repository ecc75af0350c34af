"""The specification of the kernels: the same functions in plain fp32 torch, on any device.

Each function here has its Triton twin of the same name and signature beside it, whose docstring
has the contract of both; the tests hold the twins to these. Clarity first: these loop over
sequences (never over tokens), sync, and materialise what the kernels never do. Steps of the recipe
are those of docs/recipe.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import FP8_MAX, FP8_ROOM, KeyValueStats, PostVisionStats, Selection


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
    softcap: float = 0.0,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    row_weights: Tensor | None = None,
    row_reduction: str = "sum",
    group_reduction: str = "mean",
) -> PostVisionStats:
    """Sparsity counts and token scores of one layer: `score.post_vision_stats` (recipe step 4)."""
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
        if softcap > 0:
            logits = torch.tanh(logits / softcap) * softcap
        mask = _causal(len(q_i), length_k, q.device)
        logits = logits.masked_fill(~mask, -math.inf)
        row_max = logits.amax(-1, keepdim=True)
        passes = mask & (logits - row_max >= math.log(threshold))
        attention = _softmax(logits, None if sinks is None else sinks.float()[:, None, None])
        attention = attention.masked_fill(~mask, 0.0)  # rows that see no key: 0, not NaN
        if row_weights is not None:
            attention = attention * row_weights[starts_q[i] : starts_q[i + 1], None]
        column = attention.sum(1) if row_reduction == "sum" else attention.amax(1)
        column = column.view(num_kv_heads, -1, length_k)
        column = column.mean(1) if group_reduction == "mean" else column.amax(1)
        scores[:, starts_k[i] : starts_k[i] + length_k] = column
        retained[i] = passes.sum((1, 2))
        visible[i] = mask.sum()
    return PostVisionStats(scores, retained, visible)


def key_value_stats(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    *,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> KeyValueStats:
    """Directions of keys and norms of values: `key_value_stats.key_value_stats`."""
    num_kv_heads, d = k.shape[-2:]
    starts = cu_seqlens_k.tolist()
    num_seqs = len(starts) - 1
    total_k = k.shape[0] if block_table is None else num_seqs * max_seqlen_k
    mean_key = torch.zeros(num_seqs, num_kv_heads, d, dtype=torch.float32, device=k.device)
    key_cosine, value_norm = (mean_key.new_zeros(num_kv_heads, total_k) for _ in range(2))
    for i, (length, rows) in enumerate(_live_rows(cu_seqlens_k, seqused_k, block_table, k)):
        unit = F.normalize(rows(k).float(), dim=-1)  # [n, H_kv, d]
        mean_key[i] = unit.sum(0) / max(length, 1)
        here = slice(starts[i], starts[i] + length)
        key_cosine[:, here] = (unit * F.normalize(mean_key[i], dim=-1)).sum(-1).T
        value_norm[:, here] = rows(v).float().norm(dim=-1).T
    return KeyValueStats(mean_key, mean_key.norm(dim=-1), key_cosine, value_norm)


def select_tokens(
    scores: Tensor,
    cu_seqlens: Tensor,
    keep: Tensor,
    recent: Tensor,
    *,
    max_seqlen: int,
    total_kept: int | None = None,
) -> Selection:
    """The recent window and the Top-K of the rest: `select.select_tokens` (recipe step 5)."""
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
    cu_seqlens_k: Tensor | None,
    indices: Tensor,
    cu_kept: Tensor,
    out_k: Tensor,
    out_v: Tensor,
    cu_seqlens_out: Tensor | None,
    *,
    max_kept: int,
    block_table: Tensor | None = None,
    out_block_table: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """Kept rows to the front of their segments of a ragged pool: `compact.compact_kv`."""
    num_kv_heads = k.shape[-2]
    bounds = cu_kept.tolist()
    for s in range(len(bounds) - 1):
        i, h = divmod(s, num_kv_heads)
        kept = indices[bounds[s] : bounds[s + 1]].long()
        source = _rows(kept, i, cu_seqlens_k, block_table, k)
        target = torch.arange(len(kept), device=k.device)
        target = _rows(target, s, cu_seqlens_out, out_block_table, out_k)
        for x, out, descale in ((k, out_k, k_descale), (v, out_v, v_descale)):
            rows = x.reshape(-1, *x.shape[-2:])[source, h]
            if descale is not None:
                rows = _quantised(rows, descale[s])
            out.view(-1, out.shape[-1])[target] = rows


def compact_layers(
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    cu_seqlens_k: Tensor,
    indices: Tensor,
    cu_kept: Tensor,
    out_k: Tensor,
    out_v: Tensor,
    cu_seqlens_out: Tensor,
    *,
    max_kept: int,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """compact_kv of several layers into one pool: `compact.compact_layers`."""
    for layer, (layer_k, layer_v) in enumerate(zip(k, v, strict=True)):
        starts = cu_seqlens_out[layer]
        first = layer * (len(starts) - 1)
        kept = cu_kept[first : first + len(starts)]
        compact_kv(
            *(layer_k, layer_v, cu_seqlens_k, indices, kept, out_k, out_v, starts),
            max_kept=max_kept,
            k_descale=None if k_descale is None else k_descale[layer],
            v_descale=None if v_descale is None else v_descale[layer],
        )


def kept_descales(
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    cu_seqlens_k: Tensor | None,
    indices: Tensor,
    cu_kept: Tensor,
    *,
    max_kept: int,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales by which what is kept fits into fp8: `descales.kept_descales`."""
    num_kv_heads, bounds = k[0].shape[-2], cu_kept.tolist()
    num_segments = (len(bounds) - 1) // len(k)
    descales = []
    for layers in (k, v):
        amax = torch.zeros(len(k), num_segments, 1, device=k[0].device)
        for layer, x in enumerate(layers):
            for s in range(num_segments):
                i, h = divmod(s, num_kv_heads)
                here = layer * num_segments + s
                kept = indices[bounds[here] : bounds[here + 1]].long()
                rows = x.reshape(-1, *x.shape[-2:])[_rows(kept, i, cu_seqlens_k, block_table, x), h]
                if len(rows):
                    amax[layer, s] = rows.float().abs().nan_to_num(0.0, torch.inf).max()
        descale = (amax * (FP8_ROOM / FP8_MAX)).clamp(min=torch.finfo(torch.float32).tiny)
        descales.append(torch.where(amax > 0, descale, 1.0))
    return descales[0], descales[1]


def compact_kv_(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor | None,
    indices: Tensor,
    cu_kept: Tensor,
    *,
    max_kept: int,
    block_table: Tensor | None = None,
) -> None:
    """Kept rows to the front of their own sequence, in place: `compact.compact_kv_`."""
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
    cu_seqlens_k: Tensor | None,
    indices: Tensor,
    cu_kept: Tensor,
    max_seqlen_k: int,
    *,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of what is not kept: `remainder.sum_evicted`, with all in one partial sum."""
    num_kv_heads = k.shape[-2]
    bounds = cu_kept.tolist()
    num_segments = len(bounds) - 1
    lengths = seqused_k
    if lengths is None:
        assert cu_seqlens_k is not None
        lengths = cu_seqlens_k.diff()
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
    cu_seqlens_out: Tensor | None,
    *,
    out_block_table: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """Means of what was evicted as first rows: `remainder.store_means`."""
    segments = counts.nonzero()[:, 0]
    row = _rows(torch.zeros_like(segments), segments, cu_seqlens_out, out_block_table, out_k)
    for sums, out, descale in ((sum_k, out_k, k_descale), (sum_v, out_v, v_descale)):
        mean = sums[segments].sum(1) / counts[segments, None]
        if descale is not None:
            mean = _quantised(mean, descale[segments])
        out.view(-1, out.shape[-1])[row] = mean.to(out.dtype)


def varlen_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
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
    sinks: Tensor | None = None,
    num_splits: int = 0,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of few query rows over variable-length caches: `decode.varlen_decode`. Keys are in
    one piece, whatever num_splits."""
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
    keys, values = (
        _dequantised(x[source], descale)[row_seq]  # [total_q, max_seqlen_k, num_kv_heads, d]
        for x, descale in ((flat_k, k_descale), (flat_v, v_descale))
    )
    logits = torch.einsum("qhgd,qkhd->qhgk", grouped, keys) * scale
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    if first_key_bias is not None:
        if left >= 0:
            raise ValueError(
                f"window_size: got {window_size}, expected no left bound with first_key_bias"
            )
        logits[..., :1] += first_key_bias.view(num_seqs, num_kv_heads, 1, 1)[row_seq]
    logits = logits.masked_fill(~mask[:, None, None], -math.inf)
    sink = None
    if sinks is not None:
        sink = sinks.float().view(-1, num_kv_heads, group, 1)
        sink = sink[row_seq % len(sink)]  # [total_q, H_kv, group, 1]
    weights = _softmax(logits, sink).masked_fill(~mask[:, None, None], 0.0)
    # A masked column may hold anything, NaN included: 0 * NaN would not be 0.
    values = values.masked_fill(~mask[..., None, None], 0.0)
    result = torch.einsum("qhgk,qkhd->qhgd", weights, values).reshape(total_q, num_heads, d_v)
    out = torch.empty_like(result, dtype=q.dtype) if out is None else out
    out.copy_(result)
    if return_softmax_lse:
        lse = logits.logsumexp(-1)
        lse = lse if sink is None else lse.logaddexp(sink[..., 0])
        return out, lse.reshape(total_q, num_heads).T.contiguous()
    return out


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor,
    *,
    block_table: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """A step's K and V behind the live rows, and longer lengths: `append.append_kv`."""
    num_seqs, n = k.shape[:2]
    position = seqused_k.long()[:, None] + torch.arange(n, device=k.device)  # [num_seqs, n]
    if block_table is None:
        assert cu_seqlens_k is not None
        fits = position < (cu_seqlens_k[1:] - cu_seqlens_k[:-1])[:, None]
    else:
        fits = position < block_table.shape[1] * k_cache.shape[1]
    seq = torch.arange(num_seqs, device=k.device)[:, None].expand_as(position)
    target = _rows(position[fits], seq[fits], cu_seqlens_k, block_table, k_cache)
    for new, cache, descale in ((k, k_cache, k_descale), (v, v_cache, v_descale)):
        if descale is not None:
            new = _quantised(new, descale[:, None, :, None])
        cache.view(-1, *cache.shape[-2:])[target] = new[fits].to(cache.dtype)
    seqused_k += n


def _softmax(logits: Tensor, sink: Tensor | None) -> Tensor:
    """Over the last dimension; beside a sink (of size 1 in it), whose share is dropped."""
    if sink is None:
        return logits.softmax(-1)
    sink = sink.expand(*logits.shape[:-1], 1)
    return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]


def _quantised(rows: Tensor, descale: Tensor) -> Tensor:
    """The nearest fp8 (e4m3) values, ties to even, that are rows / descale; saturating."""
    scaled = rows.float() / descale
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _dequantised(x: Tensor, descale: Tensor | None) -> Tensor:
    """Rows `[num_seqs, n, num_kv_heads, d]` in fp32, by the scales `[num_seqs, num_kv_heads]`."""
    return x.float() if descale is None else x.float() * descale[:, None, :, None]


def _live_keys(
    cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, block_table: Tensor | None, k: Tensor
) -> Tensor:
    """`[num_seqs]` int64, never more than a sequence has memory for."""
    if block_table is not None and seqused_k is not None:
        live = seqused_k.long()
    else:
        assert cu_seqlens_k is not None
        live = (cu_seqlens_k[1:] - cu_seqlens_k[:-1]).long()
        live = live if seqused_k is None else live.minimum(seqused_k)
    return live if block_table is None else live.clamp(max=block_table.shape[1] * k.shape[1])


def _rows(
    position: Tensor,
    seq: int | Tensor,
    cu_seqlens: Tensor | None,
    block_table: Tensor | None,
    x: Tensor,
) -> Tensor:
    """Flat row numbers of logical positions of sequence `seq` in a packed or paged tensor x."""
    if block_table is None:
        assert cu_seqlens is not None
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
