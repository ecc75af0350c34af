"""A later turn on a packed cache: measured by its own rows, over what was kept and what is new.

Of the rows that a turn brings its budget is kept, by the same recipe as of a prompt. What was kept
before stays, unless `max_cache_tokens` bounds what there may be in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels.types import PostVisionStats
from ..ops import Backend
from .budgets import shrink
from .config import VLCacheConfig
from .plan import CompressionPlan, make_plan, recent_tokens
from .policies import VL_CACHE, Policy
from .prompt import Prompt, count_query_rows, to_device
from .softmax import Softmax
from .statistics import LayerStats, measure_attention

ROWS_AT_ONCE = 256  # query rows; bounds the logits in memory


@dataclass(frozen=True)
class Eviction:
    """What stays of every segment of a packed cache once a turn has been measured.

    plan: of the turn's rows, positions counted from the first real one; None where all stay.
    indices: `[total]` int32, the tokens that stay, as positions in their segments, ascending,
        packed by layer, sequence and KV head. A row that stands for evicted tokens is none.
    tokens: `[num_layers, num_segments]` int64 on the host, how many they are.
    evicted: `[num_layers, num_segments]` int64 on the host, the tokens that join what each
        segment's row for the evicted stands for; 0 where there is no such row.
    """

    plan: CompressionPlan | None
    indices: Tensor
    tokens: Tensor
    evicted: Tensor


class TurnCompressor:
    """Takes the layers of one pass over a packed cache, first to last, and says what stays.

    Args:
        prompt: the rows to compress, the last ones of every segment: a turn's own, or, where
            nothing has been compressed yet, all that there are. The rows that `query_rows` counts
            are measured; a sequence without any keeps all of its rows, and is measured by all of
            them where there is a bound, for that alone.
        config: as `policy.configure` returns it.
    """

    def __init__(
        self,
        prompt: Prompt,
        config: VLCacheConfig,
        backend: Backend,
        policy: Policy = VL_CACHE,
    ) -> None:
        self.prompt, self.config, self.backend, self.policy = prompt, config, backend, policy
        self._stats: list[LayerStats] = []  # of the prompt's rows
        self._scores: list[Tensor] = []  # [num_segments, max_seqlen_k], of all rows

    @property
    def _is_bound(self) -> bool:
        return self.config.max_cache_tokens is not None

    def add(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seqused_k: Tensor,
        softmax: Softmax,
        first_key_bias: Tensor | None = None,
    ) -> None:
        """One layer, once the pass's rows are in its segments.

        Args:
            q: `[num_seqs, num_heads, n, d]`, the rows of the pass, after RoPE.
            k, v: `[num_segments, max_seqlen_k, d]`, the segments, finite behind what is live.
            seqused_k: `[num_segments]` int, how many rows are live.
            first_key_bias: `[num_segments]` fp32, as for `varlen_decode`. A row that stands for n
                tokens has n times the weight of its logit, and is as great as one of them.
        """
        prompt, num_seqs = self.prompt, len(q)
        others = [0] * num_seqs
        if self._is_bound:
            others = [count_query_rows(m, m, self.config, self.policy) for m in prompt.lengths]
        attention = _TurnAttention(q, k, seqused_k.long(), softmax, first_key_bias, prompt, others)
        if prompt.is_compressible:
            stats = measure_attention(
                attention,
                len(self._stats),
                attention.rows_of(k),
                attention.rows_of(v),
                prompt,
                self.config,
                self.backend,
                self.policy,
            )
            self._stats.append(stats)
        else:
            attention(prompt)
        scores = attention.scores
        if self.config.granularity == "layer":  # heads of a layer hold the same tokens
            scores = scores.unflatten(0, (num_seqs, -1))
            scores = scores.mean(1, keepdim=True).expand_as(scores).flatten(0, 1)
        self._scores.append(scores)

    def decide(self, seqused_k: Tensor, num_evicted: Tensor | None) -> Eviction:
        """What stays.

        Args:
            seqused_k: `[num_layers, num_segments]` int64 on the host, live rows of each segment,
                the turn's own among them.
            num_evicted: `[num_layers, num_segments]` int64 on the host, the tokens that a
                segment's first row stands for, 0 where it is a token; None in a cache without.

        Cost: a host sync (the counts); time linear in the rows of all segments.
        """
        num_layers, num_seqs = len(self._scores), len(self.prompt.pads)
        by_head = num_layers, num_seqs, -1
        num_kv_heads = seqused_k.shape[1] // num_seqs
        has_row = torch.zeros_like(seqused_k) if num_evicted is None else (num_evicted > 0).long()
        new = torch.tensor(self.prompt.lengths).repeat_interleave(num_kv_heads)
        old, new = seqused_k - new - has_row, new.expand_as(seqused_k)
        plan, evicted = None, torch.zeros_like(new)
        if not self.prompt.is_compressible:
            chosen = torch.cat([torch.arange(n) for n in new.flatten().tolist()])
            chosen = to_device(chosen, self._scores[0].device)
        else:
            plan = make_plan(
                self._stats,
                self.prompt,
                self.config,
                self.backend,
                self.policy,
                has_row=has_row.view(by_head) > 0,
            )
            new, chosen = plan.head_tokens.flatten(1), plan.indices
            if plan.evicted is not None:
                evicted = plan.evicted.flatten(1)
        indices, tokens = _behind(old, has_row, new, chosen), old + new
        if self._is_bound:
            stands = has_row + evicted > 0
            rows = tokens + stands.long()
            keep = self._bounded(rows.view(by_head)).flatten(1)
            if self.config.remainder != "none":
                stands |= keep < rows
            fewer = keep - stands.long()
            indices = self._cut(indices, tokens, fewer)
            evicted = evicted + torch.where(stands, tokens - fewer, 0)
            tokens = fewer
        return Eviction(plan, indices, tokens, evicted)

    def _bounded(self, rows: Tensor) -> Tensor:
        """Rows `[num_layers, num_seqs, num_kv_heads]`, fewer in proportion where a sequence has
        more than `max_cache_tokens` a layer."""
        assert self.config.max_cache_tokens is not None
        num_layers, _, num_kv_heads = rows.shape
        least = 1 if self.config.remainder == "none" else 2  # a token beside the row
        bound = self.config.max_cache_tokens * num_layers
        if self.policy.share_heads is None:  # the same in all heads of a layer
            of_layer = rows[..., 0]
            keep = shrink(of_layer, of_layer.sum(0).clamp(max=bound), least)
            return keep[..., None].expand_as(rows)
        heads = rows.transpose(1, 2).flatten(0, 1)
        keep = shrink(heads, heads.sum(0).clamp(max=bound * num_kv_heads), least)
        return keep.unflatten(0, (num_layers, num_kv_heads)).transpose(1, 2)

    def _cut(self, indices: Tensor, tokens: Tensor, fewer: Tensor) -> Tensor:
        """Of `tokens` a segment, which `indices` names, the `fewer` that the turn's rows attend to
        most, and the last ones, as of any prompt."""
        if torch.equal(tokens, fewer):
            return indices
        recent, kept = recent_tokens(fewer, self.config), []
        pieces = indices.long().split(tokens.sum(1).tolist())
        for layer, (scores, rows) in enumerate(zip(self._scores, pieces, strict=True)):
            starts = torch.tensor([0, *accumulate(tokens[layer].tolist())])
            counts = to_device(
                torch.stack([tokens[layer], fewer[layer], recent[layer]]), rows.device
            )
            segment = torch.arange(len(scores), device=rows.device)
            chosen, _ = self.backend.select_tokens(
                scores[segment.repeat_interleave(counts[0], output_size=len(rows)), rows][None],
                to_device(starts.int(), rows.device),
                counts[1].int(),
                counts[2].int(),
                max_seqlen=int(tokens[layer].max()),
                total_kept=int(fewer[layer].sum()),
            )
            first = to_device(starts[:-1], rows.device)
            first = first.repeat_interleave(counts[1], output_size=len(chosen))
            kept.append(rows[first + chosen])
        return torch.cat(kept).int()


@dataclass
class _TurnAttention:
    """`post_vision_stats` of the last rows of a pass, over the segments of one layer: of the tokens
    that a prompt has there, among all that the rows see.

    others: rows that are measured of a sequence without query rows, for the scores alone.
    scores: `[num_segments, max_seqlen_k]` fp32, of the latest call, of all tokens.
    """

    q: Tensor
    k: Tensor
    seqused_k: Tensor
    softmax: Softmax
    first_key_bias: Tensor | None
    prompt: InitVar[Prompt]
    others: Sequence[int]
    scores: Tensor = field(init=False)

    def __post_init__(self, prompt: Prompt) -> None:
        self.num_kv_heads = len(self.seqused_k) // len(self.q)
        counts = torch.tensor([prompt.lengths, prompt.pads]).repeat_interleave(self.num_kv_heads, 1)
        lengths, pads = to_device(counts, self.q.device)
        self.first = self.seqused_k - lengths
        # Where the prompt's rows are; pads are anywhere.
        column = torch.arange(prompt.padded_length, device=pads.device) - pads[:, None]
        self.columns = (self.first[:, None] + column.clamp(min=0)).clamp(max=self.k.shape[1] - 1)

    def rows_of(self, x: Tensor) -> Tensor:
        """The prompt's rows `[num_seqs * padded_length, num_kv_heads, d]` of k or v."""
        own = x.take_along_dim(self.columns[..., None], 1)
        return own.unflatten(0, (-1, self.num_kv_heads)).transpose(1, 2).flatten(0, 1)

    def __call__(
        self,
        prompt: Prompt,
        threshold: float = 0.01,
        row_weights: Tensor | None = None,
        row_reduction: str = "sum",
        group_reduction: str = "mean",
    ) -> PostVisionStats:
        """Of the rows that this prompt's `query_rows` count; options as for post_vision_stats."""
        weights = self._weights(prompt, row_weights)
        scores, retained = self._measure(weights, math.log(threshold), row_reduction == "max")
        self.scores = scores.mean(1) if group_reduction == "mean" else scores.amax(1)
        own = self.rows_of(self.scores[..., None])[..., 0].T
        return PostVisionStats(own, *_counts(prompt, retained.view(len(self.q), -1)))

    def _weights(self, prompt: Prompt, row_weights: Tensor | None) -> Tensor:
        """What each of the last rows counts, `[num_seqs, n]` fp32: minus infinity where it is not
        measured."""
        pairs = zip(prompt.query_rows, self.others, strict=True)
        counts = torch.tensor([n or other for n, other in pairs])[:, None]
        behind = torch.arange(int(counts.max()), 0, -1)
        weights = to_device(torch.where(behind <= counts, 1.0, -math.inf), self.q.device)
        if row_weights is not None:
            for row, own in zip(weights, row_weights.split(list(prompt.query_rows)), strict=True):
                row[len(row) - len(own) :] = own
        return weights

    def _measure(
        self, weights: Tensor, log_threshold: float, is_max: bool
    ) -> tuple[Tensor, Tensor]:
        """(scores `[num_segments, group, max_seqlen_k]`, how many entries of the prompt's tokens
        pass the filter, `[num_segments, group]`)."""
        n, device = weights.shape[1], self.q.device
        q = self.q[:, :, self.q.shape[2] - n :].unflatten(1, (self.num_kv_heads, -1)).flatten(0, 1)
        weights = weights.repeat_interleave(self.num_kv_heads, 0)
        softmax = self.softmax.by_kv_head(self.num_kv_heads)
        keys = self.k.float().transpose(1, 2)[:, None]
        column = torch.arange(keys.shape[-1], device=device)
        scores = torch.zeros(*q.shape[:2], len(column), device=device)
        retained = torch.zeros(q.shape[:2], dtype=torch.int64, device=device)
        for begin in range(0, n, ROWS_AT_ONCE):
            row = torch.arange(begin, min(begin + ROWS_AT_ONCE, n), device=device)
            weight = weights[:, row, None]
            last = self.seqused_k[:, None, None] - n + row[:, None]
            is_visible = (column <= last) & (weight >= 0)  # [num_segments, rows, max_seqlen_k]
            logits = softmax.logits(q[:, :, row].float() @ keys)
            logits.masked_fill_(~is_visible[:, None], -math.inf)
            passes = logits - logits.amax(-1, keepdim=True) >= log_threshold
            is_counted = is_visible & (column >= self.first[:, None, None])
            retained += (passes & is_counted[:, None]).sum((2, 3))
            if self.first_key_bias is not None:
                logits[..., 0] += self.first_key_bias[:, None, None]
            # Rows that are not measured see nothing.
            attention = softmax.weights(logits).nan_to_num(0.0) * weight.clamp(min=0)[:, None]
            if is_max:
                scores = torch.maximum(scores, attention.amax(2))
            else:
                scores += attention.sum(2)
        return scores, retained


def _counts(prompt: Prompt, retained: Tensor) -> tuple[Tensor, Tensor]:
    """(retained, visible) as PostVisionStats has them, of `[num_seqs, num_heads]`: runs of pads are
    sequences of their own, without rows; and so is a prompt without query rows."""
    device = retained.device
    pairs = zip(prompt.lengths, prompt.query_rows, strict=True)
    visible = [sum(max(m - behind, 0) for behind in range(n)) for m, n in pairs]
    runs = len(prompt.cu_seqlens(device)[1]) - 1
    counts = retained.new_zeros(runs, retained.shape[1]), retained.new_zeros(runs)
    is_seen = to_device(torch.tensor(visible), device)
    counts[0][prompt.segments] = retained * (is_seen > 0)[:, None]
    counts[1][prompt.segments] = is_seen
    return counts


def _behind(old: Tensor, has_row: Tensor, new: Tensor, chosen: Tensor) -> Tensor:
    """Positions of all old tokens of each segment, behind its row for the evicted if it has one,
    and of those that `chosen` names, counted behind them; packed, int32.

    Args:
        old, has_row, new: `[num_layers, num_segments]` on the host; new counts chosen.
    """
    device, counts = chosen.device, torch.stack([x.flatten() for x in (old, has_row, new)])
    kept, total = int(counts[0].sum()), int(counts[0].sum() + counts[2].sum())
    old, has_row, new = to_device(counts, device)
    segment = torch.arange(len(old), device=device)
    segment = segment.repeat_interleave(old + new, output_size=total)
    place = torch.arange(total, device=device) - ((old + new).cumsum(0) - old - new)[segment]
    is_new = place >= old[segment]
    assert int(kept) + len(chosen) == total
    which = ((new.cumsum(0) - new)[segment] + place - old[segment]).clamp(0, len(chosen) - 1)
    place = torch.where(is_new, old[segment] + chosen[which], place)
    return (place + has_row[segment]).int()
