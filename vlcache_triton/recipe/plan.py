"""From the statistics of a prompt to what is kept of it: budgets, then selection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..kernels.launch import to_device
from ..kernels.types import PostVisionStats
from ..ops import Backend
from .budgets import layer_budgets
from .config import VLCacheConfig
from .policies import VL_CACHE, Policy, PromptStatistics
from .prompt import Prompt
from .statistics import LayerStats, prompt_statistics

NO_ROW = torch.tensor(False)


@dataclass(frozen=True)
class CompressionPlan:
    """What every layer keeps of every sequence.

    prompt: the batch it was made for.
    sparsity: `[num_layers, num_seqs]` fp64 on the host, γ' (eq. 2), the mean over query heads;
        NaN for a sequence that is left whole.
    head_keep: `[num_layers, num_seqs, num_kv_heads]` int64 on the host, rows that each KV head
        keeps: tokens, and the row for the evicted ones where there is one. The same number for the
        heads of a layer, where the policy does not say otherwise; 0 at least.
    indices: `[total_tokens]` int32, the kept positions, packed by layer, sequence and KV head;
        relative to a sequence's first real token, ascending.
    cu_kept: `[num_layers * num_seqs * num_kv_heads + 1]` int32, where they start.
    evicted: `[num_layers, num_seqs, num_kv_heads]` int64 on the host, how many of the tokens a row
        of each KV head stands for; 0 where it has none, and None where none has.
    has_row: `[num_layers, num_seqs, num_kv_heads]` bool on the host, True where that row is there
        from before, and takes nothing of head_keep; NO_ROW where it nowhere is.
    """

    prompt: Prompt
    sparsity: Tensor
    head_keep: Tensor
    indices: Tensor
    cu_kept: Tensor
    evicted: Tensor | None = None
    has_row: Tensor = NO_ROW

    @property
    def num_kv_heads(self) -> int:
        """Of every layer."""
        return self.head_keep.shape[2]

    @property
    def keep(self) -> Tensor:
        """`[num_layers, num_seqs]` int64 on the host: rows kept by a KV head, in the mean; rounded
        down where a policy shares out over heads of several layers."""
        return self.head_keep.sum(-1) // self.num_kv_heads

    @property
    def head_tokens(self) -> Tensor:
        """As head_keep, of tokens alone."""
        if self.evicted is None:
            return self.head_keep
        return self.head_keep - ((self.evicted > 0) & ~self.has_row).long()

    def kept_positions(self, layer: int, seq: int) -> Tensor:
        """`[num_kv_heads, most kept by a head]` int32 on the device, ascending along the last
        dimension; -1 behind what a head keeps. `layer` counts the compressed layers."""
        tokens = self.head_tokens
        counts = tokens[layer, seq].tolist()
        start = int(tokens[:layer].sum() + tokens[layer, :seq].sum())
        kept = self.indices[start : start + sum(counts)].split(counts)
        return pad_sequence(list(kept), batch_first=True, padding_value=-1)

    def layer_cu_kept(self, layer: int) -> Tensor:
        """This layer's `[num_seqs * num_kv_heads + 1]` part of cu_kept."""
        width = self.head_keep[layer].numel()
        return self.cu_kept[layer * width : (layer + 1) * width + 1]


def make_plan(
    stats: Sequence[LayerStats],
    prompt: Prompt,
    config: VLCacheConfig,
    backend: Backend,
    policy: Policy = VL_CACHE,
    has_row: Tensor = NO_ROW,
) -> CompressionPlan:
    """Budgets from sparsity (eq. 2, Algorithm 1), then Top-K of the scores (recipe steps 3 to 5).

    Args:
        stats: of each layer, over the rows that `prompt.cu_seqlens` describes.
        config: as `policy.configure` returns it.
        policy: what tokens are ranked by, and how heads and layers share the budget.
        has_row: as CompressionPlan has it.

    Cost: one host sync (the counts), and those of the policy; time linear in
    num_layers * num_kv_heads * total_k.
    """
    post_vision = stack_layers(stats)
    scores, known = rank_tokens(stats, post_vision, prompt, config, policy)
    density = layer_density(post_vision, prompt).cpu()  # the sync
    head_keep = None
    if policy.share_heads is not None:
        keep = prompt_budgets(density, prompt, config)
        head_keep = keep[..., None].repeat(1, 1, scores.shape[1])
        for i, span in enumerate(prompt.spans):
            if prompt.query_rows[i]:
                shares = policy.share_heads(scores[..., span], known[i], keep[:, i])
                head_keep[:, i] = _checked(shares, head_keep[:, i], prompt.lengths[i])
    return plan_from_scores(scores, density, prompt, config, backend, head_keep, has_row)


def stack_layers(stats: Sequence[LayerStats]) -> PostVisionStats:
    """What the query rows say of all layers at once."""
    layers = zip(*(s.post_vision for s in stats), strict=True)
    return PostVisionStats(*(torch.stack(x) for x in layers))


def rank_tokens(
    stats: Sequence[LayerStats],
    post_vision: PostVisionStats,
    prompt: Prompt,
    config: VLCacheConfig,
    policy: Policy,
) -> tuple[Tensor, list[PromptStatistics]]:
    """Scores `[num_layers, num_kv_heads, total_k]` as ranked, and what the policy knows of each
    prompt: nothing, where it does not ask. Arguments as for make_plan, and their stack_layers."""
    attention = layer_scores(post_vision, prompt, config).contiguous()
    if policy.score is None and policy.share_heads is None:
        return attention, []
    known = prompt_statistics(stats, attention, prompt)
    if policy.score is None:
        return attention, known
    scores = torch.zeros_like(attention)
    for span, statistics in zip(prompt.spans, known, strict=True):
        scores[..., span] = policy.score(statistics)
    return scores, known


def _checked(shares: Tensor, even: Tensor, length: int) -> Tensor:
    """The shares of a policy, if they sum to what even shares would, none more than the prompt."""
    got = f"shape {tuple(shares.shape)}"
    if shares.shape == even.shape:
        got = f"{int(shares.sum())} tokens in all, from {int(shares.min())} to {int(shares.max())}"
        if shares.sum() == even.sum() and shares.min() >= 0 and shares.max() <= length:
            return shares
    raise ValueError(
        f"share_heads: got {got}, expected shape {tuple(even.shape)} (num_layers, num_kv_heads) of"
        f" {int(even.sum())} tokens in all, from 0 to {length}"
    )


def plan_from_scores(
    scores: Tensor,
    density: Tensor,
    prompt: Prompt,
    config: VLCacheConfig,
    backend: Backend,
    keep: Tensor | None = None,
    has_row: Tensor = NO_ROW,
) -> CompressionPlan:
    """The plan of scores that are ready to be ranked: make_plan without its statistics. No sync.

    Args:
        scores: `[num_layers, num_kv_heads, total_k]`.
        density: `[num_layers, num_seqs]` fp64 on the host, 1 - γ'; NaN where left whole.
        keep: `[num_layers, num_seqs]` int64 on the host, the rows of each head of a layer, or
            `[num_layers, num_seqs, num_kv_heads]`; default by the density.
    """
    if keep is None:
        keep = prompt_budgets(density, prompt, config)
    if keep.ndim == 2:
        head_keep = keep[..., None].expand(-1, -1, scores.shape[1])
        any_row = has_row.any(-1)  # the same in all heads of a layer
        tokens = kept_tokens(keep, prompt, config, any_row)
        indices, cu_kept = select_kept(scores, tokens, prompt, config, backend)
    else:
        head_keep = keep
        tokens = kept_tokens(head_keep, prompt, config, has_row)
        indices, cu_kept = select_by_head(scores, tokens, prompt, config, backend)
    evicted = evicted_tokens(head_keep, prompt, config, has_row)
    return CompressionPlan(prompt, 1.0 - density, head_keep, indices, cu_kept, evicted, has_row)


def layer_scores(stats: PostVisionStats, prompt: Prompt, config: VLCacheConfig) -> Tensor:
    """`[num_kv_heads, total_k]` that the heads of a layer rank tokens by: ψ, averaged over
    neighbours within a sequence and over heads, where configured. Several layers may lead."""
    scores = stats.scores
    if config.smoothing > 1:
        scores = scores.clone()
        for span in prompt.spans:
            scores[..., span] = smooth(stats.scores[..., span], config.smoothing)
    if config.granularity == "kv_head":
        return scores
    return scores.mean(-2, keepdim=True).expand_as(scores)


def smooth(scores: Tensor, width: int) -> Tensor:
    """The mean of each score and its neighbours, `width` in all, fewer at the ends; `[..., m]`."""
    return F.avg_pool1d(scores, width, 1, width // 2, count_include_pad=False)


def layer_density(stats: PostVisionStats, prompt: Prompt) -> Tensor:
    """1 - γ' (eq. 2) `[num_seqs]` fp64 of a layer, the mean over heads; NaN where left whole.
    Several layers may lead."""
    retained = stats.retained.double().mean(-1)[..., prompt.segments]
    return retained / stats.visible[..., prompt.segments]


def prompt_budgets(density: Tensor, prompt: Prompt, config: VLCacheConfig) -> Tensor:
    """Tokens to keep `[num_layers, num_seqs]` int64; all of a sequence that is left whole."""
    lengths = torch.tensor(prompt.lengths)
    keep = layer_budgets(density.nan_to_num(1.0), lengths, config)
    return torch.where(torch.tensor(prompt.query_rows) == 0, lengths, keep)


def kept_tokens(
    rows: Tensor, prompt: Prompt, config: VLCacheConfig, has_row: Tensor = NO_ROW
) -> Tensor:
    """Tokens among the rows that are kept, `[num_layers, num_seqs, ...]` int64 on the host.

    One row less where it is to stand for the others: where a token is evicted, and a token is kept
    beside it, and no row is there from before. Never falls where the rows grow, which streaming
    relies on.
    """
    if config.remainder == "none":
        return rows
    is_new = (rows > 1) & (rows < _lengths_like(rows, prompt))
    return rows - (is_new & ~has_row).long()


def evicted_tokens(
    rows: Tensor, prompt: Prompt, config: VLCacheConfig, has_row: Tensor = NO_ROW
) -> Tensor | None:
    """How many tokens the row of each KV head stands for, as CompressionPlan has it."""
    if config.remainder == "none":
        return None
    tokens = kept_tokens(rows, prompt, config, has_row)
    return torch.where((tokens < rows) | has_row, _lengths_like(rows, prompt) - tokens, 0)


def _lengths_like(rows: Tensor, prompt: Prompt) -> Tensor:
    """The prompts' lengths along the second dimension."""
    return torch.tensor(prompt.lengths).view(1, -1, *[1] * (rows.ndim - 2))


def recent_tokens(keep: Tensor, config: VLCacheConfig) -> Tensor:
    """How many of `keep` are the last ones: `recent_fraction` of it rounded half up, at least the
    prompt's last token (recipe step 5)."""
    recent = (config.recent_fraction * keep.double() + 0.5).floor().long()
    return recent.clamp(min=1).minimum(keep)


def select_kept(
    scores: Tensor, keep: Tensor, prompt: Prompt, config: VLCacheConfig, backend: Backend
) -> tuple[Tensor, Tensor]:
    """(indices, cu_kept) as in CompressionPlan, for scores `[num_layers, num_kv_heads, total_k]`
    and keep `[num_layers, num_seqs]` on the host. No sync."""
    num_layers, num_kv_heads, _ = scores.shape
    cu_seqlens = prompt.cu_seqlens(scores.device)[1]
    counts = torch.zeros(2, num_layers, len(cu_seqlens) - 1, dtype=torch.int32)
    counts[:, :, prompt.segments] = torch.stack([keep, recent_tokens(keep, config)]).int()
    counts = to_device(counts, scores.device)
    indices, cu_kept = backend.select_tokens(
        scores.contiguous(),
        cu_seqlens,
        counts[0],
        counts[1],
        max_seqlen=prompt.padded_length,
        total_kept=num_kv_heads * int(keep.sum()),
    )
    # Runs of pads keep nothing: their empty segments are left out.
    starts = cu_kept[:-1].view(num_layers, -1, num_kv_heads)[:, prompt.segments].reshape(-1)
    return indices, torch.cat([starts, cu_kept[-1:]])


def select_by_head(
    scores: Tensor, head_keep: Tensor, prompt: Prompt, config: VLCacheConfig, backend: Backend
) -> tuple[Tensor, Tensor]:
    """As select_kept, for head_keep `[num_layers, num_seqs, num_kv_heads]`: each head is selected
    for as if it were a layer, and the segments then put in order."""
    keep = head_keep.transpose(1, 2).flatten(0, 1)  # [num_layers * num_kv_heads, num_seqs]
    indices, _ = select_kept(scores.flatten(0, 1)[:, None], keep, prompt, config, backend)
    pieces = indices.split(keep.flatten().tolist())
    num_layers, num_seqs, num_kv_heads = head_keep.shape
    order = torch.arange(len(pieces)).view(num_layers, num_kv_heads, num_seqs).transpose(1, 2)
    indices = torch.cat([pieces[i] for i in order.flatten().tolist()])
    counts = head_keep.flatten().to(indices.device)
    return indices, torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def whole_plan(
    prompt: Prompt, num_layers: int, num_kv_heads: int, device: torch.device
) -> CompressionPlan:
    """The plan that keeps everything: for decoding on a full cache in the ragged layout."""
    keep = torch.tensor(prompt.lengths).expand(num_layers, -1)
    ranges = [torch.arange(n, dtype=torch.int32, device=device) for n in prompt.lengths]
    one_layer = torch.cat([x.expand(num_kv_heads, -1).reshape(-1) for x in ranges])
    counts = torch.tensor(prompt.lengths, device=device).repeat_interleave(num_kv_heads)
    ends = counts.repeat(num_layers).cumsum(0)
    cu_kept = torch.cat([ends.new_zeros(1), ends]).int()
    unmeasured = torch.full(keep.shape, math.nan, dtype=torch.float64)
    indices = one_layer.repeat(num_layers)
    head_keep = keep[..., None].expand(-1, -1, num_kv_heads)
    return CompressionPlan(prompt, unmeasured, head_keep, indices, cu_kept)
