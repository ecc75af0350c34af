"""What a user may choose about compression: one frozen, validated dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard, get_args

Allocation = Literal["sparsity", "uniform", "pyramid"]
Clipping = Literal["exact", "paper"]
Granularity = Literal["kv_head", "layer"]
Remainder = Literal["none", "mean"]
CacheDtype = Literal["auto", "fp8_e4m3"]
RowReduction = Literal["sum", "max"]
GroupReduction = Literal["mean", "max"]


@dataclass(frozen=True, kw_only=True)
class VLCacheConfig:
    """The choices of VL-Cache (Tu et al., ICLR 2025); the defaults are the paper's recipe.

    Args:
        budget: share of the prompt's KV cache that is kept over all layers, a float in (0, 1];
            or an int >= 2, the mean number of tokens kept a layer. 1.0 is lossless: nothing is
            scored, moved or dropped, unless `max_cache_tokens` is set. The int 1 is refused: it
            nearly always is a mistake for 1.0. (The paper's α.)
        threshold: p of the ThresholdFilter (eq. 1), in (0, 1): an attention entry counts as zero
            below p times the maximum of its row.
        recent_fraction: share of a layer's budget that is forced to the most recent tokens,
            in [0, 1]; at least one token is always kept (Algorithm 1 uses 0.1).
        min_layer_budget, max_layer_budget: bounds of a layer's budget as shares of the prompt,
            0 <= min <= max <= 1 (Algorithm 1 clips to [0.01, 1]).
        clipping: "exact" shares out among the other layers what clipping takes or leaves, so that
            the layers add up to the budget exactly; "paper" clips each layer on its own, as
            Algorithm 1 is written, so that the total can be less or more than the budget.
        allocation: how the total is shared over the layers: "sparsity" (Algorithm 1), "uniform",
            or "pyramid" (linearly falling with depth, after PyramidKV), for comparison.
        granularity: "kv_head" selects tokens for each KV head on its own, "layer" one set for
            all heads of a layer.
        row_reduction: a token's score of a query head is the "sum" of its attention over the
            post-vision rows (the paper), or the "max", so that one row which needs it is enough.
        group_reduction: its score of a KV head is the "mean" over that head's query heads, or the
            "max" (both maxima are DefensiveKV's, Feng et al. 2025).
        smoothing: average the scores over this many neighbouring tokens before they are ranked, an
            odd int; 1 ranks them as they are (the paper).
        remainder: "mean" lets one row of each KV head's budget stand for all that it evicts: their
            mean K and V, with the weight of their number (docs/remainder.md); "none" lets the
            softmax share their weight out among the kept tokens (the paper).
        max_cache_tokens: an int >= 2, the mean number of rows a layer that a KV head of a sequence
            may hold once a prompt or a later turn has been read; None sets no bound. A prompt's
            budget is lowered to it. What a turn brings too much goes from all that is there, the
            least attended by the turn's rows first; an answer may exceed it by its own length
            (docs/recipe.md, "Later turns").
        kv_cache_dtype: "auto" stores what is kept, and what follows it, in the model's dtype;
            "fp8_e4m3" in 8 bits, with a scale of K and one of V for each KV head of a sequence,
            found from what is kept (docs/layout.md, "In 8 bits"). What is left whole stays as it
            is, so that it takes a budget below 1.0.
        max_query_rows: use only the last this many post-vision rows as queries; None uses all.
        text_window: for a prompt without an image: use its last this many rows as post-vision
            rows; None leaves such a prompt uncompressed.

    Raises:
        ValueError: naming the argument, what was got and what was expected.
    """

    budget: float | int = 0.1
    threshold: float = 0.01
    recent_fraction: float = 0.1
    min_layer_budget: float = 0.01
    max_layer_budget: float = 1.0
    clipping: Clipping = "exact"
    allocation: Allocation = "sparsity"
    granularity: Granularity = "kv_head"
    row_reduction: RowReduction = "sum"
    group_reduction: GroupReduction = "mean"
    smoothing: int = 1
    remainder: Remainder = "none"
    max_cache_tokens: int | None = None
    kv_cache_dtype: CacheDtype = "auto"
    max_query_rows: int | None = None
    text_window: int | None = None

    def __post_init__(self) -> None:
        """Check each field by its name, and turn numbers of other kinds (NumPy's) into Python's."""
        self._set("budget", _budget(self.budget))
        if not _is_number(self.threshold) or not 0 < self.threshold < 1:
            raise _invalid("threshold", self.threshold, "a float in (0, 1)")
        for name in ("recent_fraction", "min_layer_budget", "max_layer_budget"):
            share = getattr(self, name)
            if not _is_number(share) or not 0 <= share <= 1:
                raise _invalid(name, share, "a float in [0, 1]")
        for name in ("threshold", "recent_fraction", "min_layer_budget", "max_layer_budget"):
            self._set(name, float(getattr(self, name)))
        if self.min_layer_budget > self.max_layer_budget:
            raise _invalid(
                "max_layer_budget", self.max_layer_budget, "a float in [min_layer_budget, 1]"
            )
        for name, words in (
            ("clipping", Clipping),
            ("allocation", Allocation),
            ("granularity", Granularity),
            ("row_reduction", RowReduction),
            ("group_reduction", GroupReduction),
            ("remainder", Remainder),
            ("kv_cache_dtype", CacheDtype),
        ):
            word = getattr(self, name)
            if not isinstance(word, str) or word not in get_args(words):
                raise _invalid(name, word, f"one of {get_args(words)}")
        if not _is_int(self.smoothing) or self.smoothing < 1 or self.smoothing % 2 == 0:
            raise _invalid("smoothing", self.smoothing, "an odd int >= 1")
        self._set("smoothing", int(self.smoothing))
        for name, least in (("max_cache_tokens", 2), ("max_query_rows", 1), ("text_window", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            if not _is_int(value) or value < least:
                raise _invalid(name, value, f"None or an int >= {least}")
            self._set(name, int(value))
        if self.is_fp8 and self.is_lossless:
            raise _invalid("kv_cache_dtype", self.kv_cache_dtype, "'auto' where budget=1.0")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the class is frozen

    @classmethod
    def tuned(cls, budget: float | int = 0.1, **choices: Any) -> VLCacheConfig:
        """What answered best on tuning pages of the embedded model; not the paper's recipe.

        Maxima over rows and over the heads of a group, so that one row of one head which needs a
        token is enough; one set of tokens for the KV heads of a layer; and a row of the budget for
        what is evicted. On held-out pages it keeps far more answers than the paper's recipe
        (benchmarks/results/accuracy); on other models, measure first (`vlcache eval --model`).

        Args:
            choices: further fields, which take precedence.
        """
        preset: dict[str, Any] = {
            "row_reduction": "max",
            "group_reduction": "max",
            "granularity": "layer",
            "remainder": "mean",
        }
        return cls(budget=budget, **{**preset, **choices})

    @property
    def is_lossless(self) -> bool:
        """True at budget 1.0 without a bound, where the cache is left exactly as it is."""
        is_whole = isinstance(self.budget, float) and self.budget == 1.0
        return is_whole and self.max_cache_tokens is None

    @property
    def is_fp8(self) -> bool:
        """Whether compressed caches store K and V in fp8."""
        return self.kv_cache_dtype == "fp8_e4m3"


def _budget(budget: object) -> float | int:
    if _is_int(budget):
        if budget == 1:
            raise ValueError(
                "budget: got the int 1, one token a layer, expected 1.0 (the whole cache),"
                " a share such as 0.1, or an int >= 2 (tokens a layer)"
            )
        if budget >= 2:
            return int(budget)
    elif _is_number(budget) and 0 < budget <= 1:
        return float(budget)
    raise _invalid("budget", budget, "a float in (0, 1] or an int >= 2 (tokens a layer)")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _invalid(name: str, got: object, expected: str) -> ValueError:
    return ValueError(f"{name}: got {got!r}, expected {expected}")
