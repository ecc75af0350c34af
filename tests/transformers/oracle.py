"""VL-Cache computed the slow and obvious way, on the stock model with its full cache.

`kept_tokens` reads the eager attention maps of a prefill and works out, step by step of the recipe,
which tokens stay. `evicted` then runs the stock model in eager attention with its own
DynamicCache, where every later forward masks what was dropped, and sees the mean of it as one key
of the weight of all where the configuration says so. Nothing here comes from the package but
`layer_budgets` and `shrink`, which have tests of their own.

`Dialogue` does the same over turns: each pass that holds an image evicts from its own rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from families import Family
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from vlcache_triton import VLCacheConfig, layer_budgets
from vlcache_triton.integrations.transformers.names import CACHE


class Kept(list):
    """For each layer of the model: None where all is kept, else bool [num_seqs, num_kv_heads,
    prompt].

    rows: for each layer alike, where a mean stands for what is evicted, [num_seqs, num_kv_heads].
    real: bool [num_seqs, prompt], False on pads.
    rounded: what each layer holds in fp8, once a pass has looked at it; None where nothing is.
    """

    def __init__(self, num_layers: int, real: Tensor) -> None:
        super().__init__([None] * num_layers)
        self.rows: list[Tensor | None] = [None] * num_layers
        self.real = real
        self.rounded: dict[int, Rounded] | None = None

    def repeated(self, copies: int) -> Kept:
        """Of as many copies of each sequence."""
        result = Kept(len(self), self.real.repeat_interleave(copies, 0))
        result.rounded = None if self.rounded is None else {}
        for layer, (kept, rows) in enumerate(zip(self, self.rows, strict=True)):
            if kept is not None:
                result[layer] = kept.repeat_interleave(copies, 0)
                result.rows[layer] = rows.repeat_interleave(copies, 0)
        return result


_NAME = "masked_oracle"
_kept: Kept | None = None
_maps: dict[int, Tensor] = {}  # of the latest pass: the softmax of each layer, columns as there


def kept_tokens(family: Family, inputs: dict[str, Tensor], config: VLCacheConfig) -> Kept:
    """What each compressible layer keeps of these prompts; left pads are never kept."""
    maps = attention_maps(family, inputs)
    ids = inputs["input_ids"]
    starts = (inputs["attention_mask"] == 0).sum(1).tolist()
    layer_types = getattr(family.text_config, "layer_types", None) or ["full_attention"] * len(maps)
    full = [i for i, kind in enumerate(layer_types) if kind == "full_attention"]
    # Transformers has maps of layers with attention alone.
    attending = [i for i, kind in enumerate(layer_types) if kind.endswith("_attention")]
    attending = [i for i in attending if layer_types[i] != "linear_attention"]
    maps = dict(zip(attending, maps, strict=True))
    kept = Kept(len(layer_types), inputs["attention_mask"] == 1)
    kept.rounded = {} if config.is_fp8 else None
    for i in full:
        text = family.text_config
        num_kv_heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
        kept[i] = torch.zeros(len(ids), num_kv_heads, ids.shape[1], dtype=torch.bool)
        kept.rows[i] = torch.zeros(len(ids), num_kv_heads, dtype=torch.bool)
    for b, start in enumerate(starts):
        length = ids.shape[1] - start
        rows = query_rows(family, inputs, b, config)
        if rows is None or config.is_lossless:
            for i in full:
                kept[i][b, :, start:] = True
            continue
        attention = [maps[i][b, :, start:, start:][:, rows].double() for i in full]
        density = [[1 - sparsity(a, rows, config.threshold)] for a in attention]
        density = torch.tensor(density, dtype=torch.float64)
        budgets = layer_budgets(density, torch.tensor([length]), config).flatten().tolist()
        for i, a, budget in zip(full, attention, budgets, strict=True):
            if config.remainder == "mean" and 2 <= budget < length:
                kept.rows[i][b] = True
                budget -= 1
            kept[i][b, :, start:] = top_tokens(a, budget, kept[i].shape[1], config)
    return kept


def attention_maps(family: Family, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Each layer's eager attention of the prefill that generate makes, [num_seqs, heads, m, m]."""
    with attention_implementation(family, "eager"):
        out = family.model.generate(
            **inputs, max_new_tokens=1, output_attentions=True, return_dict_in_generate=True
        )
    return list(out.attentions[0])


def query_rows(
    family: Family, inputs: dict[str, Tensor], seq: int, config: VLCacheConfig
) -> range | None:
    """The post-vision rows of a prompt, pads not counted; None where it is left alone."""
    real = inputs["attention_mask"][seq] == 1
    ids = inputs["input_ids"][seq, real]
    length = len(ids)
    vision = ids == family.model.config.image_token_id
    if hasattr(family.model.config, "video_token_id"):
        vision |= ids == family.model.config.video_token_id
    if "mm_token_type_ids" in inputs:
        vision |= inputs["mm_token_type_ids"][seq, real] > 0
    if not vision.any():
        if config.text_window is None:
            return None
        return range(max(0, length - config.text_window), length)
    first = min(int(vision.nonzero().max()) + 1, length - 1)  # an image at the end: the last row
    if config.max_query_rows is not None:
        first = max(first, length - config.max_query_rows)
    return range(first, length)


def sparsity(attention: Tensor, rows: range, threshold: float) -> float:
    """Equations 1 and 2: the share of the visible entries that the ThresholdFilter zeroes."""
    visible = torch.zeros(len(rows), attention.shape[-1], dtype=torch.bool)
    for j, row in enumerate(rows):
        visible[j, : row + 1] = True
    largest = attention.masked_fill(~visible, 0).amax(-1, keepdim=True)
    zeroed = (attention < threshold * largest) & visible
    return int(zeroed.sum()) / (len(attention) * int(visible.sum()))  # mean over the query heads


def top_tokens(attention: Tensor, budget: int, num_kv_heads: int, config: VLCacheConfig) -> Tensor:
    """Bool [num_kv_heads, length]: the recent window, then the highest accumulated attention."""
    num_heads, _, length = attention.shape
    score = attention.sum(1) if config.row_reduction == "sum" else attention.amax(1)
    score = score.view(num_kv_heads, num_heads // num_kv_heads, length)
    score = score.mean(1) if config.group_reduction == "mean" else score.amax(1)
    if config.granularity == "layer":
        score = score.mean(0, keepdim=True).expand(num_kv_heads, -1)
    half = config.smoothing // 2
    near = [slice(max(0, j - half), j + half + 1) for j in range(length)]
    score = torch.stack([score[:, neighbours].mean(1) for neighbours in near], 1)
    recent = min(budget, max(1, math.floor(config.recent_fraction * budget + 0.5)))
    kept = torch.zeros(num_kv_heads, length, dtype=torch.bool)
    kept[:, length - recent :] = True
    for head in range(num_kv_heads):
        older = score[head, : length - recent].tolist()
        order = sorted(range(len(older)), key=lambda j: (-older[j], j))
        kept[head, order[: budget - recent]] = True
    return kept


def positions(kept: Kept, inputs: dict[str, Tensor], layer: int, seq: int) -> Tensor:
    """Kept positions [num_kv_heads, n] of a layer, counted from the sequence's first real token."""
    start = int((inputs["attention_mask"][seq] == 0).sum())
    return torch.stack([head.nonzero().flatten() - start for head in kept[layer][seq]])


@contextmanager
def evicted(family: Family, kept: Kept, copies: int = 1) -> Iterator[None]:
    """In this block the model's forwards after the prefill do not see what `kept` leaves out.

    `copies`: beams or returned sequences of each prompt; they share its prefill.
    """
    global _kept
    _kept = kept.repeated(copies)
    try:
        with attention_implementation(family, _NAME):
            yield
    finally:
        _kept = None


@contextmanager
def attention_implementation(family: Family, name: str) -> Iterator[None]:
    """The decoder's attention is `name` in this block; the vision tower's stays."""
    config = family.model.config
    key = next(key for key in config.sub_configs if getattr(config, key) is family.text_config)
    before = family.text_config._attn_implementation
    family.model.set_attn_implementation({key: name})
    try:
        yield
    finally:
        family.model.set_attn_implementation({key: before})


def _masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Eager attention; past the prefill, evicted prompt tokens are masked for each KV head."""
    cap = kwargs.get("softcap")
    group = query.shape[1] // key.shape[1]
    kept = _kept[module.layer_idx]
    is_behind = kept is not None and key.shape[2] > kept.shape[2]
    if is_behind:
        evicted = ~kept & _kept.real[:, None] & _kept.rows[module.layer_idx][..., None]
        mean_k, mean_v, bias = means(evicted, key, value)
        if _kept.rounded is not None:
            rounded = _kept.rounded.setdefault(module.layer_idx, Rounded())
            key, mean_k = rounded.of("k", key, mean_k, kept, evicted)
            value, mean_v = rounded.of("v", value, mean_v, kept, evicted)
    logits = _capped(query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling, cap)
    logits = logits + attention_mask[..., : key.shape[2]]
    if is_behind:
        prompt = kept.repeat_interleave(group, 1)[:, :, None]  # [num_seqs, num_heads, 1, prompt]
        logits[..., : kept.shape[2]].masked_fill_(~prompt, -math.inf)
        row = _capped(query @ mean_k.repeat_interleave(group, 1).transpose(2, 3) * scaling, cap)
        row = row + bias.repeat_interleave(group, 1)
        logits = torch.cat([row, logits], -1)
        value = torch.cat([mean_v, value], 2)
    weights = _weights(logits, kwargs.get("s_aux"))
    _maps[module.layer_idx] = weights.detach()
    out = weights @ value.repeat_interleave(group, 1)
    return out.transpose(1, 2).contiguous(), weights


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    """Of a text that caps its logits softly, as Gemma2."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _weights(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Of a text whose heads have sinks, as gpt-oss: one more logit, whose weight goes nowhere."""
    if sinks is None:
        return logits.softmax(-1)
    more = sinks[None, :, None, None].expand(*logits.shape[:3], 1)
    return torch.cat([logits, more], -1).softmax(-1)[..., :-1]


class Rounded:
    """A layer whose K and V are stored in e4m3.

    The scale of a head is found from what is kept when something is evicted first: it fits into
    half of what e4m3 can hold. What is evicted later has been rounded before, as has the mean that
    it joins.
    """

    def __init__(self) -> None:
        self.descale: dict[str, Tensor] = {}
        self.means: dict[str, tuple[Tensor, Tensor]] = {}  # and what they stand for

    def of(
        self, name: str, x: Tensor, mean: Tensor, kept: Tensor, evicted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x `[num_seqs, num_kv_heads, n, d]`, and the mean of what is evicted, as they are read."""
        columns = kept.shape[2]
        if name not in self.descale:
            largest = x[:, :, :columns].abs().amax(-1).masked_fill(~kept, 0).amax(-1)
            self.descale[name] = torch.where(largest > 0, largest * (2 / 448), 1)[..., None, None]
            self.means[name] = self._stored(name, mean), evicted
        x = self._stored(name, x)
        mean, before = self.means[name]
        more = evicted.clone()
        more[..., : before.shape[2]] &= ~before
        if more.any():
            total = mean * before.sum(-1)[..., None, None]
            total = total + (x[:, :, :columns] * more[..., None]).sum(2, keepdim=True)
            mean = self._stored(name, total / evicted.sum(-1).clamp(min=1)[..., None, None])
            self.means[name] = mean, evicted
        return x, mean

    def _stored(self, name: str, x: Tensor) -> Tensor:
        codes = (x / self.descale[name]).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes.to(x.dtype) * self.descale[name]


def means(evicted: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean key and value `[num_seqs, num_kv_heads, 1, d]` of evicted tokens, and the logarithm
    of their number, `[num_seqs, num_kv_heads, 1, 1]`: minus infinity hides the mean of none."""
    num_seqs, num_kv_heads = evicted.shape[:2]
    mean_k, mean_v = torch.zeros_like(key[:, :, :1]), torch.zeros_like(value[:, :, :1])
    bias = torch.full((num_seqs, num_kv_heads, 1, 1), -math.inf)
    for b in range(num_seqs):
        for h in range(num_kv_heads):
            positions = evicted[b, h].nonzero().flatten()
            if len(positions):
                mean_k[b, h, 0] = key[b, h, positions].mean(0)
                mean_v[b, h, 0] = value[b, h, positions].mean(0)
                bias[b, h] = math.log(len(positions))
    return mean_k, mean_v, bias


class Dialogue:
    """Passes of the stock model over one full cache, masked by what each of them has evicted.

    kept: what every layer sees of the columns read so far, for each KV head.
    counts: of the latest pass that evicted, rows that each head was given of its segment,
        `[num_layers, num_seqs]`, and the columns that it kept of it.
    """

    def __init__(self, family: Family, config: VLCacheConfig) -> None:
        self.family, self.config = family, config
        self.cache = DynamicCache(config=family.model.config)
        text = family.text_config
        num_layers = text.num_hidden_layers
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * num_layers
        self.full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        self.num_kv_heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
        self.kept: Kept | None = None
        self.has_evicted = False
        self.counts = torch.zeros(0)

    def read(self, inputs: dict[str, Tensor], real: Tensor | None = None) -> Tensor:
        """A pass; its logits `[num_seqs, n, vocabulary]`.

        real: `[num_seqs, n]` bool, False on the pads among its rows; default: the last columns of
            the mask, or no pad.
        """
        global _kept
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        if real is None:
            real = torch.ones_like(ids) == 1 if mask is None else mask[:, -ids.shape[1] :] == 1
        if self.kept is None:
            self.kept = Kept(self.family.text_config.num_hidden_layers, real[:, :0])
            for i in self.full:
                self.kept[i] = torch.zeros(len(ids), self.num_kv_heads, 0, dtype=torch.bool)
                self.kept.rows[i] = torch.zeros(len(ids), self.num_kv_heads, dtype=torch.bool)
        _kept = self.kept
        try:
            with attention_implementation(self.family, _NAME), torch.no_grad():
                out = self.family.model(**inputs, **{CACHE: self.cache}, use_cache=True)
        finally:
            _kept = None
        num_seen = self.kept.real.shape[1]
        self.kept.real = torch.cat([self.kept.real, real], 1)
        for i in self.full:
            new = real[:, None].expand(-1, self.num_kv_heads, -1)
            self.kept[i] = torch.cat([self.kept[i], new], 2)
        visual = self._is_visual(inputs) & real
        if visual.any() and not self.config.is_lossless:
            self._evict(num_seen if self.has_evicted else 0, num_seen, visual)
            if self.config.is_fp8 and not self.has_evicted:
                self.kept.rounded = {}
            self.has_evicted = True
        elif self.has_evicted and self.config.max_cache_tokens and ids.shape[1] > 1:
            for seq in range(len(ids)):
                rows = torch.arange(num_seen, num_seen + ids.shape[1])[real[seq]]
                self._bound(seq, rows)
        return out.logits

    def _is_visual(self, inputs: dict[str, Tensor]) -> Tensor:
        config, ids = self.family.model.config, inputs["input_ids"]
        return (ids == config.image_token_id) | (ids == getattr(config, "video_token_id", -1))

    def _evict(self, start: int, num_seen: int, visual: Tensor) -> None:
        """From the columns behind `start`, by the rows behind each sequence's last visual one."""
        assert self.kept is not None
        self.counts = torch.zeros(len(self.full), len(visual), dtype=torch.long)
        for seq, is_visual in enumerate(visual):
            columns = self.kept.real[seq].nonzero().flatten()
            columns = columns[columns >= start]
            length = len(columns)
            self.counts[:, seq] = length
            if not is_visual.any():
                if self.config.max_cache_tokens and self.has_evicted:
                    self._bound(seq, columns[columns >= num_seen])
                continue
            total = self.kept.real.shape[1]
            first = min(num_seen + int(is_visual.nonzero().max()) + 1, total - 1)
            if self.config.max_query_rows is not None:
                first = max(first, total - self.config.max_query_rows)
            rows = torch.arange(first, total)
            densities, maps = [], []
            for i in self.full:
                attention, largest = self._attention(i, seq, rows)
                attention = attention[..., columns]
                visible = columns <= rows[:, None]
                passes = (attention >= self.config.threshold * largest) & visible
                densities.append([int(passes.sum()) / (len(attention) * int(visible.sum()))])
                maps.append(attention)
            density = torch.tensor(densities, dtype=torch.float64)
            budgets = layer_budgets(density, torch.tensor([length]), self.config)
            self.counts[:, seq] = budgets[:, 0]
            for i, attention, budget in zip(self.full, maps, budgets[:, 0].tolist(), strict=True):
                kept, has_row = self.kept[i], bool(self.kept.rows[i][seq, 0])
                if self.config.remainder == "mean" and not has_row and 2 <= budget < length:
                    self.kept.rows[i][seq] = True
                    budget -= 1
                top = top_tokens(attention, budget, self.num_kv_heads, self.config)
                kept[seq][:, columns] = top
            if self.config.max_cache_tokens:
                self._bound(seq, rows)

    def _attention(self, layer: int, seq: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of these rows, to every column `[num_heads, rows, columns]` fp64, and the largest of a
        token in each row, `[num_heads, rows, 1]`: also of each that a mean stands for."""
        assert self.kept is not None
        total = self.kept.real.shape[1]
        maps = _maps[layer][seq].double()
        maps = maps[:, rows - (total - maps.shape[1])]
        largest = maps[..., maps.shape[2] - total :].amax(-1, keepdim=True)
        if maps.shape[2] > total:  # the mean comes first
            group = len(maps) // self.num_kv_heads
            evicted = (~self.kept[layer][seq] & self.kept.real[seq]).sum(-1).clamp(min=1)
            alone = maps[..., :1] / evicted.repeat_interleave(group)[:, None, None]
            largest = torch.maximum(largest, alone)
        return maps[..., maps.shape[2] - total :], largest

    def live_rows(self) -> Tensor:
        """Of each head `[num_layers, num_seqs, num_kv_heads]`: tokens, and the row for others."""
        assert self.kept is not None
        return torch.stack([self.kept[i].sum(-1) + self.kept.rows[i].long() for i in self.full])

    def _bound(self, seq: int, rows: Tensor) -> None:
        """What is over `max_cache_tokens` goes, the least attended by these rows first."""
        from vlcache_triton.recipe.budgets import shrink

        assert self.kept is not None
        live = self.live_rows()[:, seq, 0]
        bound = self.config.max_cache_tokens * len(self.full)
        if int(live.sum()) <= bound:
            return
        keep = shrink(live[:, None], torch.tensor([bound]), 2 if self.has_mean else 1)[:, 0]
        for i, count, before in zip(self.full, keep.tolist(), live.tolist(), strict=True):
            if count == before:
                continue
            attention, _ = self._attention(i, seq, rows)
            if self.has_mean:
                self.kept.rows[i][seq] = True
                count -= 1
            for head in range(self.num_kv_heads):
                columns = self.kept[i][seq, head].nonzero().flatten()
                group = len(attention) // self.num_kv_heads
                one = attention[head * group : (head + 1) * group][..., columns]
                top = top_tokens(one, count, 1, self.config)[0]
                self.kept[i][seq, head, columns[~top]] = False

    @property
    def has_mean(self) -> bool:
        """Whether means stand for what is evicted."""
        return self.config.remainder == "mean"


AttentionInterface.register(_NAME, _masked_attention)
AttentionMaskInterface.register(_NAME, eager_mask)
