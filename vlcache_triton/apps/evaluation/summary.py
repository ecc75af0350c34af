"""From the results of items to shares with their intervals: plain numbers for tables and plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .metrics import wilson_interval


@dataclass(frozen=True)
class Cell:
    """One variant at one budget on one suite.

    num_items: answered.
    exact: share of exact matches, exact_low and exact_high its 95 % interval (Wilson).
    retained: exact matches among the `num_full` items that the full cache answers right, and its
        interval; None where there is none.
    anls, agreement: means (see metrics). hit_rate: mean over the answers with decoded rows.
    kv_bytes: mean, of the prompt.
    """

    suite: str
    variant: str
    budget: float
    num_items: int
    exact: float
    exact_low: float
    exact_high: float
    num_full: int
    retained: float | None
    retained_low: float
    retained_high: float
    anls: float
    agreement: float
    hit_rate: float | None
    kv_bytes: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


ALL_SUITES = "all"


def summarise(results: Iterable[dict[str, Any]]) -> list[Cell]:
    """The cells of all suites, and of all items together under the suite "all".

    Args:
        results: as `evaluate_item` returns them.
    """
    groups: dict[tuple[str, str, float], list[tuple[dict[str, Any], bool]]] = defaultdict(list)
    suites: dict[str, None] = {}
    for result in results:
        full_is_right = result["rows"][0]["exact"]
        suites[result["suite"]] = None
        for row in result["rows"]:
            for suite in (result["suite"], ALL_SUITES):
                groups[suite, row["variant"], row["budget"]].append((row, full_is_right))
    return [
        _cell(*key, rows) for key, rows in groups.items() if len(suites) > 1 or key[0] != ALL_SUITES
    ]


def _cell(
    suite: str, variant: str, budget: float, rows: Sequence[tuple[dict[str, Any], bool]]
) -> Cell:
    exact = sum(row["exact"] for row, _ in rows)
    exact_low, exact_high = wilson_interval(exact, len(rows))
    retained = [row["exact"] for row, full_is_right in rows if full_is_right]
    retained_low, retained_high = wilson_interval(sum(retained), len(retained))
    hits = [row["hit_rate"] for row, _ in rows if row["hit_rate"] is not None]
    return Cell(
        suite,
        variant,
        budget,
        len(rows),
        exact / len(rows),
        exact_low,
        exact_high,
        len(retained),
        sum(retained) / len(retained) if retained else None,
        retained_low,
        retained_high,
        sum(row["anls"] for row, _ in rows) / len(rows),
        sum(row["agreement"] for row, _ in rows) / len(rows),
        sum(hits) / len(hits) if hits else None,
        sum(row["kv_bytes"] for row, _ in rows) / len(rows),
    )


def pick(cells: Iterable[Cell], suite: str, variant: str, budget: float) -> Cell | None:
    """The cell of these names, or None where it was not measured."""
    return next(
        (c for c in cells if (c.suite, c.variant, c.budget) == (suite, variant, budget)), None
    )


def names(cells: Iterable[Cell], key: str) -> list[Any]:
    """The different values of a field, in the order in which they come."""
    return list(dict.fromkeys(getattr(cell, key) for cell in cells))
