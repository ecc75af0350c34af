"""What is compared: a configuration and a policy under one name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from vlcache_triton.recipe.config import Remainder, VLCacheConfig
from vlcache_triton.recipe.policies import (
    POLICIES,
    VL_CACHE,
    Policy,
    PromptStatistics,
    calibrated,
    hindsight,
    snapkv,
)
from vlcache_triton.recipe.policies.rows import all_rows, keep_window
from vlcache_triton.recipe.profile import HeadHits, HeadProfile

BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)

# What tables and figures show first, by name.
FULL, PAPER, OURS, FLOOR, ORACLE = "full", "vl_cache", "tuned", "random", "attention oracle"
PAPER_BY_LAYER, PAPER_CLIPPING = "vl_cache, one set a layer", "vl_cache, literal clipping"
PEER = "snapkv, tuned"
WITH_ROW, WITHOUT_ROW = ", a row", ", no row"
#: What is compared with a row for the evicted tokens, and without; and PEER, tuned for each.
REMAINDERS = (PAPER, PAPER_BY_LAYER, OURS, FLOOR, ORACLE)


@dataclass(frozen=True)
class Variant:
    """One row of a comparison."""

    name: str
    config: VLCacheConfig
    policy: Policy = VL_CACHE

    @property
    def effective(self) -> VLCacheConfig:
        """The configuration with what the policy sets."""
        return self.policy.configure(self.config)


#: Budget, and the attention of the prompt's answer, where there is any -> what to compare.
Comparison = Callable[[float, Tensor | None], Sequence[Variant]]


def compare_all(budget: float, attention: Tensor | None) -> list[Variant]:
    """VL-Cache as it can be read, its rivals, its ablation, and the attention oracle; some of them
    with a row for what is evicted as well."""
    oracle = [] if attention is None else [attention_oracle(budget, attention)]
    variants = [*rivals(budget), *readings(budget), *ablation(budget), *oracle]
    with_rows = [with_row(v) for v in variants if v.name in REMAINDERS]
    return [*variants, *with_rows, tuned_snapkv(budget, "mean")]


def rivals(budget: float) -> list[Variant]:
    """VL-Cache as in the paper, every published policy, and the tuned presets, at one budget."""
    config = VLCacheConfig(budget=budget)
    tuned = Variant(OURS, VLCacheConfig.tuned(budget=budget))
    policies = [p for p in POLICIES if p.name != FULL]
    return [*(Variant(p.name, config, p) for p in policies), tuned_snapkv(budget), tuned]


def tuned_snapkv(budget: float, remainder: Remainder = "none") -> Variant:
    """SnapKV with the window and the pooling that answered best on the tuning pages, without a row
    for what is evicted and with one, of as many candidates as `VLCacheConfig.tuned()` was chosen
    from: benchmarks/results/accuracy/tuning.md. A maximum of neighbours, which its authors' code
    has as well."""
    width = 5 if remainder == "none" else 3
    window = 20
    score = keep_window(window, partial(_max_pooled, width))
    policy = replace(snapkv(window, pool=1), score=score)
    # Its window is what is recent.
    config = VLCacheConfig(budget=budget, recent_fraction=0.0, remainder=remainder)
    return Variant(PEER if remainder == "none" else PEER + WITH_ROW, config, policy)


def _max_pooled(width: int, statistics: PromptStatistics) -> Tensor:
    return F.max_pool1d(statistics.attention, width, 1, width // 2)


def readings(budget: float) -> list[Variant]:
    """The paper where it can be read in another way than "vl_cache" reads it: one set of tokens for
    the heads of a layer, as EffiVLM-Bench does; its clipping to the letter."""
    config = VLCacheConfig(budget=budget)
    return [
        Variant(PAPER_BY_LAYER, replace(config, granularity="layer")),
        Variant(PAPER_CLIPPING, replace(config, clipping="paper")),
    ]


def ablation(budget: float) -> list[Variant]:
    """The two ideas of the paper, each on and off; "vl_cache" is the cell that has both.

    All rows score in place of the post-vision rows, for the layers' sparsity too; uniform layers
    in place of sparsity-aware ones.
    """
    config = VLCacheConfig(budget=budget)
    uniform = replace(config, allocation="uniform")
    policy = Policy("all_rows", all_rows)
    return [
        Variant("post-vision, uniform", uniform),
        Variant("all rows, sparsity-aware", config, policy),
        Variant("all rows, uniform", uniform, policy),
    ]


def attention_oracle(budget: float, attention: Tensor) -> Variant:
    """Ranks the tokens of one prompt by the attention that its answer did pay; see
    `policies.hindsight`. No upper bound of what a policy can reach."""
    return Variant(ORACLE, VLCacheConfig(budget=budget), hindsight(attention))


def with_profile(
    profile: HeadProfile | HeadHits, budget: float, attention: Tensor | None = None
) -> list[Variant]:
    """The paper's recipe and the tuned preset, with the heads' shares of a profile and without."""
    policy = calibrated(profile)
    paper, ours = VLCacheConfig(budget=budget), VLCacheConfig.tuned(budget=budget)
    return [
        Variant(PAPER, paper),
        Variant(f"{PAPER}, calibrated", paper, policy),
        Variant(OURS, ours),
        Variant(f"{OURS}, calibrated", ours, policy),
    ]


def with_row(variant: Variant) -> Variant:
    """The same with a row of the budget for what is evicted; without it, where it has one."""
    has_row = variant.config.remainder == "mean"
    name = variant.name + (WITHOUT_ROW if has_row else WITH_ROW)
    config = replace(variant.config, remainder="none" if has_row else "mean")
    return replace(variant, name=name, config=config)


def base_name(name: str) -> str:
    """Of the variant that this one is, but for a row for what is evicted."""
    return name.removesuffix(WITH_ROW).removesuffix(WITHOUT_ROW)
