"""What is compared: a configuration and a policy under one name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from vlcache_triton.recipe.config import VLCacheConfig
from vlcache_triton.recipe.policies import POLICIES, VL_CACHE, Policy, hindsight

BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


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


def rivals(budget: float) -> list[Variant]:
    """VL-Cache as in the paper, the tuned preset, and every published policy, at one budget."""
    config = VLCacheConfig(budget=budget)
    tuned = Variant("tuned", VLCacheConfig.tuned(budget=budget))
    policies = [p for p in POLICIES if p.name != "full"]
    return [Variant(p.name, config, p) for p in policies] + [tuned]


def ablation(budget: float) -> list[Variant]:
    """The two ideas of the paper, each on and off; "vl_cache" is the cell that has both.

    All rows score in place of the post-vision rows, for the layers' sparsity too; uniform layers
    in place of sparsity-aware ones.
    """
    config = VLCacheConfig(budget=budget)
    uniform = replace(config, allocation="uniform")
    all_rows = Policy("all_rows", lambda post_vision, length: length)
    return [
        Variant("post-vision, uniform", uniform),
        Variant("all rows, sparsity-aware", config, all_rows),
        Variant("all rows, uniform", uniform, all_rows),
    ]


def with_rows(variants: Sequence[Variant]) -> list[Variant]:
    """The same with a row of the budget for what is evicted; without it, where one has it."""
    return [
        replace(
            v,
            name=f"{v.name}, no row" if v.config.remainder == "mean" else f"{v.name}, a row",
            config=replace(v.config, remainder="none" if v.config.remainder == "mean" else "mean"),
        )
        for v in variants
    ]


def ceiling(budget: float, attention: Tensor) -> list[Variant]:
    """The hindsight oracle of one prompt; see `policies.hindsight`."""
    return [Variant("hindsight", VLCacheConfig(budget=budget), hindsight(attention))]
