"""What else could rank tokens: many candidates on tuning pages, by masks on the full cache.

    python benchmarks/accuracy/study_scores.py results.jsonl --pages 30 --table study.md

Prompts that the full cache answers right are asked again with the right answer's tokens given
(teacher forcing), while each layer and KV head sees only the prompt tokens that a candidate keeps.
An answer survives if each of its tokens would still be chosen. One prefill serves all candidates,
so that a page costs seconds; `vlcache eval` then measures what was chosen on other pages, through
the compressed cache itself. Finished pages are kept in the results file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlcache_triton import VLCacheConfig, layer_budgets
from vlcache_triton.apps.evaluation.metrics import wilson_interval
from vlcache_triton.apps.formreader import (
    Task,
    chat,
    draw_dialogue,
    encode_chats,
    load_form_reader,
    render,
)
from vlcache_triton.recipe.policies import adaptive_heads

# As `vlcache eval` calls them, so that the split "test" has its pages.
SETS: dict[str, tuple[Task, ...]] = {
    "value": ("value",),
    "next": ("next",),
    "value, 3 turns": ("value",) * 3,
    "count": ("count",),
    "list": ("list",),
}
BUDGETS = (0.05, 0.1, 0.2)
GRID = 24  # visual tokens of the embedded model lie on a square grid
COPIES = 40  # candidates decoded on at once
SAFEGUARD = 0.2  # of Ada-KV


class Seen(NamedTuple):
    """What a prefill shows. attention: `[num_layers, num_heads, τ, m]`, of the post-vision rows;
    all_rows, decoded: `[num_layers, num_heads, m]`, summed over all the prompt's rows, and over
    the answer's; value_norms: `[num_layers, num_kv_heads, m]`; image: where visual tokens begin."""

    attention: Tensor
    all_rows: Tensor
    decoded: Tensor
    value_norms: Tensor
    image: int


@dataclass(frozen=True)
class Candidate:
    """score: `[num_layers, num_kv_heads, m]`; rows: the last ones that sparsity is measured on;
    half: layers lie half-way between sparsity-aware and uniform; remainder: a row of the budget
    stands for what is evicted."""

    name: str
    score: Callable[[Seen], Tensor]
    rows: int | None = None
    allocation: str = "sparsity"
    recent_fraction: float = 0.1
    shares_heads: bool = False
    half: bool = False
    remainder: bool = False

    def keep(self, seen: Seen, budget: float) -> Tensor:
        """`[num_layers, num_kv_heads, m]` bool."""
        scores = self.score(seen)
        num_layers, num_kv_heads, length = scores.shape
        config = VLCacheConfig(budget=budget, allocation=self.allocation)  # type: ignore[arg-type]
        density = self._density(seen)[:, None]
        keep = layer_budgets(density, torch.tensor([length]), config)[:, 0]
        mask = torch.zeros_like(scores, dtype=torch.bool)
        for layer in range(num_layers):
            count = int(keep[layer])
            if self.remainder and 1 < count < length:
                count -= 1
            recent = max(1, int(self.recent_fraction * count + 0.5))
            ranked = scores[layer].clone()
            ranked[:, length - recent :] = torch.inf
            counts = torch.full((num_kv_heads,), count)
            if self.shares_heads:
                counts = adaptive_heads(ranked[None], torch.tensor([count]), SAFEGUARD)[0]
            for head in range(num_kv_heads):
                # Equal scores, which maxima of neighbours are: the lower position, as the recipe.
                order = ranked[head].sort(descending=True, stable=True).indices
                mask[layer, head, order[: int(counts[head])]] = True
        return mask

    def _density(self, seen: Seen) -> Tensor:
        rows, length = seen.attention.shape[2:]
        rows = min(self.rows or rows, rows)
        attention = seen.attention[:, :, -rows:]
        visible = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
        passes = (attention >= 0.01 * attention.amax(-1, keepdim=True)) & visible
        density = passes.sum((2, 3)).double().mean(1) / visible.sum()
        return density + density.mean() if self.half else density


def grouped(scores: Tensor, how: str = "mean", num_kv_heads: int = 2) -> Tensor:
    """Query heads `[num_layers, num_heads, m]` to KV heads."""
    x = scores.unflatten(1, (num_kv_heads, -1))
    return {"mean": x.mean(2), "max": x.amax(2), "rms": x.pow(2).mean(2).sqrt()}[how]


def last(seen: Seen, rows: int | None = None) -> Tensor:
    """Attention summed over the last post-vision rows."""
    return (seen.attention if rows is None else seen.attention[:, :, -rows:]).sum(2)


def smooth(scores: Tensor, width: int = 3, how: str = "mean") -> Tensor:
    """The mean or maximum of neighbours."""
    x = scores.flatten(0, 1)[:, None]
    if how == "mean":
        pooled = F.avg_pool1d(x, width, 1, width // 2, count_include_pad=False)
    else:
        pooled = F.max_pool1d(x, width, 1, width // 2)
    return pooled.view(scores.shape)


def smooth_grid(scores: Tensor, image: int, width: int = 3) -> Tensor:
    """The mean of neighbours on the page; text as it is."""
    scores = scores.clone()
    page = scores[..., image : image + GRID**2].reshape(-1, 1, GRID, GRID)
    pooled = F.avg_pool2d(page, width, 1, width // 2, count_include_pad=False)
    scores[..., image : image + GRID**2] = pooled.view(*scores.shape[:2], -1)
    return scores


def one_set(scores: Tensor) -> Tensor:
    """One ranking for the KV heads of a layer."""
    return scores.mean(1, keepdim=True).expand_as(scores)


def maxima(rows: int | None, width: int = 3, group: str = "max") -> Callable[[Seen], Tensor]:
    """The maximum over the last rows, smoothed over neighbours."""

    def score(seen: Seen) -> Tensor:
        attention = seen.attention if rows is None else seen.attention[:, :, -rows:]
        return smooth(grouped(attention.amax(2), group), width)

    return score


def floored(scores: Tensor) -> Tensor:
    """DefensiveKV's floor: the mean over the tokens."""
    return scores.maximum(scores.mean(-1, keepdim=True))


def random_scores(seen: Seen) -> Tensor:
    """The floor under all tables."""
    shape = grouped(last(seen)).shape
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def ramp(seen: Seen, power: int) -> Tensor:
    """Later rows weigh more."""
    rows = seen.attention.shape[2]
    weights = torch.linspace(0, 1, rows + 1)[1:] ** power
    return (seen.attention * weights[:, None]).sum(2)


def last_16(how: str = "mean") -> Callable[[Seen], Tensor]:
    """The last 16 rows, smoothed over three neighbours: what most candidates vary."""
    return lambda seen: smooth(grouped(last(seen, 16), how))


def snapkv(window: int, width: int, how: str) -> Callable[[Seen], Tensor]:
    """SnapKV: attention of the last rows, pooled over neighbours; the rows' own tokens first."""

    def score(seen: Seen) -> Tensor:
        scores = smooth(grouped(last(seen, window)), width, how)
        scores[..., -window:] = 1e6 + torch.arange(window)  # above any sum, the latest first
        return scores

    return score


CANDIDATES = [
    Candidate("paper", lambda s: grouped(last(s))),
    Candidate("paper, uniform layers", lambda s: grouped(last(s)), allocation="uniform"),
    Candidate("all rows", lambda s: grouped(s.all_rows)),
    Candidate("all rows, uniform layers", lambda s: grouped(s.all_rows), allocation="uniform"),
    Candidate("all post-vision rows, mean of 3", lambda s: smooth(grouped(last(s)))),
    Candidate("last 16 rows", lambda s: grouped(last(s, 16)), 16),
    *(
        Candidate(f"last {n} rows, mean of 3", lambda s, n=n: smooth(grouped(last(s, n))), n)
        for n in (8, 12, 16, 20, 24)
    ),
    Candidate("last 16, mean of 5", lambda s: smooth(grouped(last(s, 16)), 5), 16),
    Candidate("last 16, mean of 7", lambda s: smooth(grouped(last(s, 16)), 7), 16),
    Candidate("last 16, maximum of 3", lambda s: smooth(grouped(last(s, 16)), 3, "max"), 16),
    Candidate(
        "last 16, mean of 3 x 3 cells", lambda s: smooth_grid(grouped(last(s, 16)), s.image), 16
    ),
    Candidate("last 16, mean of 3, uniform", last_16(), 16, "uniform"),
    Candidate("last 16, mean of 3, half-adaptive", last_16(), 16, half=True),
    Candidate("last 16, mean of 3, sparsity of all rows", last_16()),
    Candidate("last 16, mean of 3, group maximum", last_16("max"), 16),
    Candidate("last 16, mean of 3, group rms", last_16("rms"), 16),
    Candidate(
        "last 16, mean of 3, row maximum",
        lambda s: smooth(grouped(s.attention[:, :, -16:].amax(2))),
        16,
    ),
    Candidate(
        "all post-vision rows, mean of 3, row maximum",
        lambda s: smooth(grouped(s.attention.amax(2))),
    ),
    Candidate(
        "last 16, mean of 3, value norms",
        lambda s: smooth(grouped(last(s, 16)) * s.value_norms),
        16,
    ),
    Candidate("last 16, mean of 3, Ada-KV heads", last_16(), 16, shares_heads=True),
    Candidate("last 16, mean of 3, none recent", last_16(), 16, recent_fraction=0.0),
    Candidate("last 16, mean of 3, 20 % recent", last_16(), 16, recent_fraction=0.2),
    Candidate("last 16, mean of 3, one set a layer", lambda s: one_set(last_16()(s)), 16),
    Candidate(
        "last 16, maximum of 3, one set a layer",
        lambda s: one_set(smooth(grouped(last(s, 16)), 3, "max")),
        16,
    ),
    Candidate("rows weighted by a ramp, mean of 3", lambda s: smooth(grouped(ramp(s, 1)))),
    Candidate("rows weighted by a squared ramp, mean of 3", lambda s: smooth(grouped(ramp(s, 2)))),
    Candidate("last 16, mean of 3, row and group maximum", maxima(16), 16),
    *(
        Candidate(f"last {n}, mean of 3, row and group maximum", maxima(n), n)
        for n in (8, 12, 24, 32)
    ),
    Candidate("last 16, mean of 5, row and group maximum", maxima(16, 5), 16),
    Candidate("last 16, row and group maximum", maxima(16, 1), 16),
    Candidate("last 16, mean of 3, row and group maximum, uniform", maxima(16), 16, "uniform"),
    Candidate("last 16, mean of 3, row and group maximum, sparsity of all rows", maxima(16)),
    Candidate(
        "last 16, mean of 3, row and group maximum, none recent",
        maxima(16),
        16,
        recent_fraction=0.0,
    ),
    Candidate(
        "last 16, mean of 3, row and group maximum, one set a layer",
        lambda s: one_set(maxima(16)(s)),
        16,
    ),
    Candidate(
        "last 16, mean of 3, row and group maximum, floored at the mean",
        lambda s: floored(maxima(16)(s)),
        16,
    ),
    Candidate(
        "last 16, mean of 3, row and group maximum, Ada-KV heads", maxima(16), 16, shares_heads=True
    ),
    Candidate("all post-vision rows, row and group maximum", maxima(None, 1)),
    Candidate("all post-vision rows, mean of 3, row and group maximum", maxima(None)),
    Candidate(
        "all post-vision rows, row and group maximum, uniform", maxima(None, 1), None, "uniform"
    ),
    Candidate(
        "all post-vision rows, row and group maximum, one set a layer",
        lambda s: one_set(maxima(None, 1)(s)),
    ),
    Candidate("all post-vision rows, row maximum", maxima(None, 1, "mean")),
    Candidate("all post-vision rows, group maximum", lambda s: grouped(last(s), "max")),
    Candidate(
        "all post-vision rows, row and group maximum, none recent",
        maxima(None, 1),
        recent_fraction=0.0,
    ),
    Candidate(
        "all post-vision rows, row and group maximum, uniform, one set a layer",
        lambda s: one_set(maxima(None, 1)(s)),
        allocation="uniform",
    ),
    Candidate("paper, one set a layer", lambda s: one_set(grouped(last(s)))),
    Candidate("random", random_scores, allocation="uniform", recent_fraction=0.0),
    Candidate("attention oracle", lambda s: grouped(s.decoded), recent_fraction=0.0),
]
#: SnapKV's own choices, about as many candidates as `tuned()` was chosen from.
CANDIDATES += [
    Candidate(
        f"SnapKV, window {window}, {how} of {width}" if width > 1 else f"SnapKV, window {window}",
        snapkv(window, width, how),
        allocation="uniform",
        recent_fraction=0.0,
    )
    for window in (1, 4, 8, 12, 16, 20, 24, 32)
    for width, how in ((1, "mean"), *product((3, 5, 7), ("mean", "maximum")))
]
CANDIDATES += [replace(c, name=f"{c.name}; a row", remainder=True) for c in CANDIDATES]


class Study:
    """The model, with what its last prefill showed, and the masks of the pass that runs."""

    def __init__(self) -> None:
        self.model, self.processor = load_form_reader()
        self.states: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.keep, self.length = torch.empty(0), 0  # [num_layers, copies, num_kv_heads, m]; m
        self.remainder = torch.empty(0)  # [copies], which have a row for what is evicted
        AttentionInterface.register("study_record", self._record)
        AttentionInterface.register("study_mask", self._mask)
        AttentionMaskInterface.register("study_record", sdpa_mask)
        AttentionMaskInterface.register("study_mask", lambda *args, **kwargs: None)

    @torch.inference_mode()
    def ask(
        self, name: str, index: int, budgets: tuple[float, ...], split: str = "tune"
    ) -> dict[str, bool] | None:
        """For each "budget|candidate", whether the answer survives; None where the full cache is
        wrong, or its answer is a single token."""
        dialogue = draw_dialogue(f"{split}-{name}-{index}", SETS[name])
        images, texts = [render(p) for p in dialogue.pages], [q.text for q in dialogue.questions]
        replies = [q.answer for q in dialogue.questions]
        first = encode_chats(self.processor, [chat(images, texts[:1])])
        whole = encode_chats(self.processor, [chat(images, texts, replies[:-1])])["input_ids"][0]
        tokenizer = self.processor.tokenizer
        answer = [
            *tokenizer(replies[-1], add_special_tokens=False).input_ids,
            tokenizer.eos_token_id,
        ]
        ids = torch.cat([whole, torch.tensor(answer[:-1])])
        self.length = first["input_ids"].shape[1]
        with self._attention("study_record"):
            logits = self.model(
                input_ids=ids[None],
                attention_mask=torch.ones_like(ids)[None],
                pixel_values=first["pixel_values"],
            ).logits[0]
        read = ids[self.length :]
        if logits[-len(answer) :].argmax(-1).tolist() != answer or len(read) == 0:
            return None
        seen = self.look(first["input_ids"][0], len(answer) - 1)
        # The first token of a single turn is the prefill's own, whatever is kept.
        judged = torch.tensor(answer[-min(len(answer), len(read)) :])
        survived = {}
        for budget in budgets:
            for start in range(0, len(CANDIDATES), COPIES):
                some = CANDIDATES[start : start + COPIES]
                self.keep = torch.stack([c.keep(seen, budget) for c in some], 1)
                self.remainder = torch.tensor([c.remainder for c in some])
                chosen = self._logits(read, len(some)).argmax(-1)[:, -len(judged) :]
                right = (chosen == judged).all(1)
                for candidate, is_right in zip(some, right.tolist(), strict=True):
                    survived[f"{budget}|{candidate.name}"] = is_right
        return survived

    def _logits(self, ids: Tensor, copies: int) -> Tensor:
        """What is said behind each of `ids`, `[copies, n, vocab_size]`, on the masked prompt."""
        position = torch.arange(self.length, self.length + len(ids))[None]
        with self._attention("study_mask"):
            out = self.model.model.language_model(
                input_ids=ids.expand(copies, -1), position_ids=position, use_cache=False
            )
        return self.model.lm_head(out.last_hidden_state)

    def look(self, prompt_ids: Tensor, num_decoded: int) -> Seen:
        """What the recorded prompt, and the last `num_decoded` rows behind it, attended to."""
        is_visual = (prompt_ids == self.model.config.image_token_id).nonzero()
        image, m = int(is_visual[0]), self.length
        post_vision = m - 1 - int(is_visual[-1])
        parts = []
        for q, k, v in self.states.values():
            attention = _attention(q[:, :m], k[:, :m])
            decoded = _attention(q[:, q.shape[1] - num_decoded :], k)[..., :m]
            norms = v[:, :m].norm(dim=-1)
            parts.append((attention[:, -post_vision:], attention.sum(1), decoded.sum(1), norms))
        return Seen(*(torch.stack(x) for x in zip(*parts, strict=True)), image)

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        self.model.set_attn_implementation({"text_config": name})
        try:
            yield
        finally:
            self.model.set_attn_implementation({"text_config": "sdpa"})

    def _record(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask, **kwargs: Any):
        self.states[module.layer_idx] = (q[0], k[0], v[0])
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

    def _mask(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask, **kwargs: Any):
        """New rows see what is kept of the recorded prompt, the row for the rest where there is
        one, and one another."""
        prompt_k, prompt_v = (x[:, : self.length] for x in self.states[module.layer_idx][1:])
        copies, num_heads, n, _ = q.shape
        k, v = (
            torch.cat([old.expand(copies, -1, -1, -1), new], 2)
            for old, new in ((prompt_k, k), (prompt_v, v))
        )
        keep = self.keep[module.layer_idx]  # [copies, num_kv_heads, m]
        evicted = (~keep & self.remainder[:, None, None]).to(k.dtype)
        count = evicted.sum(-1, keepdim=True)
        means = [
            torch.einsum("chm,hmd->chd", evicted, x) / count.clamp(min=1)
            for x in (prompt_k, prompt_v)
        ]
        k, v = (torch.cat([row[:, :, None], x], 2) for row, x in zip(means, (k, v), strict=True))
        # log(0) hides the row that stands for nothing.
        mask = torch.cat([count.log(), torch.where(keep, 0.0, -torch.inf)], 2)
        mask = mask.repeat_interleave(num_heads // k.shape[1], 1)[:, :, None]
        causal = torch.full((n, n), -torch.inf).triu(1)
        mask = torch.cat([mask.expand(-1, -1, n, -1), causal.expand(copies, num_heads, -1, -1)], 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None


def _attention(q: Tensor, k: Tensor) -> Tensor:
    """Causal attention `[num_heads, n, m]` of the last n rows."""
    k = k.repeat_interleave(len(q) // len(k), 0)
    n, m = q.shape[1], k.shape[1]
    hidden = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
    logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def table(path: Path) -> str:
    """Markdown: the share of answers that survive by candidate and budget, with its 95 % interval;
    then by set, and the mean over the sets."""
    counts: dict[tuple[str, str, str], list[bool]] = defaultdict(list)  # set, budget, candidate
    asked: dict[str, int] = defaultdict(int)
    for line in map(json.loads, path.read_text().splitlines()):
        if line["survived"] is not None:
            asked[line["set"]] += 1
            for key, survived in line["survived"].items():
                budget, _, name = key.partition("|")
                counts[line["set"], budget, name].append(survived)
    budgets = sorted({budget for _, budget, _ in counts}, key=float)
    names = list(dict.fromkeys(name for _, _, name in counts))
    rows = [f"| candidate | {' | '.join(f'{float(b):.0%}' for b in budgets)} |"]
    rows.append("|---|" + "---:|" * len(budgets))
    for name in names:
        cells = []
        for budget in budgets:
            found = [x for of in asked for x in counts[of, budget, name]]
            low, high = wilson_interval(sum(found), len(found))
            cells.append(f"{sum(found) / len(found):.3f} ({low:.2f} to {high:.2f})")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    rows += ["", f"At {' / '.join(f'{float(b):.0%}' for b in budgets)}, by set:", ""]
    rows.append(f"| candidate | {' | '.join(asked)} | mean of the sets |")
    rows.append("|---|" + "---:|" * (len(asked) + 1))
    for name in names:
        shares = [
            [sum(found) / len(found) for b in budgets if (found := counts[of, b, name])]
            for of in asked
        ]
        means = [sum(column) / len(column) for column in zip(*shares, strict=True)]
        cells = [" / ".join(f"{share:.2f}" for share in row) for row in (*shares, means)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    number = ", ".join(f"{n} of {name}" for name, n in asked.items())
    return f"Answers that the full cache gives right: {number}.\n\n" + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="JSON Lines, gone on from")
    parser.add_argument("--pages", type=int, default=30, help="of each set")
    parser.add_argument("--sets", nargs="+", default=["value", "next", "value, 3 turns"])
    parser.add_argument("--table", type=Path, help="write the table here, too")
    parser.add_argument(
        "--split", default="tune", help="whose pages; `vlcache eval` asks about those of test"
    )
    parser.add_argument(
        "--only", default="", help="candidates whose names this pattern is found in"
    )
    arguments = parser.parse_args()
    CANDIDATES[:] = [c for c in CANDIDATES if re.search(arguments.only, c.name)]
    done = set()
    if arguments.results.exists():
        lines = map(json.loads, arguments.results.read_text().splitlines())
        done = {(line["set"], line["index"]) for line in lines}
    study = Study()
    with arguments.results.open("a") as file:
        for index in range(arguments.pages):
            for name in arguments.sets:
                if (name, index) not in done:
                    survived = study.ask(name, index, BUDGETS, arguments.split)
                    line = {"set": name, "index": index, "survived": survived}
                    file.write(json.dumps(line) + "\n")
                    file.flush()
    page = table(arguments.results)
    print(page)
    if arguments.table:
        arguments.table.write_text(page)


if __name__ == "__main__":
    main()
