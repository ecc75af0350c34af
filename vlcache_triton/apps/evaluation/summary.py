"""From the results of items to shares with their intervals: plain numbers for tables and plots."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .metrics import wilson_interval
from .variants import FULL


@dataclass(frozen=True)
class Cell:
    """One variant at one budget on one suite, or in the mean of the suites.

    num_items: answered.
    exact: share of exact matches, exact_low and exact_high its 95 % interval (Wilson).
    ratio: the accuracy ratio, `exact` over that of the full cache: answers that come out right
        though the full cache has them wrong make up for others; None where the full cache has none.
    retained: kept of right, exact matches among the `num_full` items that the full cache answers
        right, and its interval; None where there is none.
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
    ratio: float | None
    num_full: int
    retained: float | None
    retained_low: float
    retained_high: float
    anls: float
    agreement: float
    hit_rate: float | None
    kv_bytes: float


MEAN = "mean of the tasks"


def summarise(results: Iterable[dict[str, Any]]) -> list[Cell]:
    """The cells of each suite, in the order in which they come, then of their mean.

    The mean weighs every suite alike, however many items it has and the full cache answers.

    Args:
        results: as `evaluate_item` returns them.
    """
    groups: dict[str, dict[tuple[str, float], list[tuple[dict[str, Any], bool]]]] = {}
    for result in results:
        suite = groups.setdefault(result["suite"], defaultdict(list))
        for row in result["rows"]:
            suite[row["variant"], row["budget"]].append((row, result["rows"][0]["exact"]))
    cells = [
        _cell(name, *key, rows, _mean([row["exact"] for row, _ in suite[FULL, 1.0]]))
        for name, suite in groups.items()
        for key, rows in suite.items()
    ]
    return cells + (_means(cells) if len(groups) > 1 else [])


def _cell(
    suite: str,
    variant: str,
    budget: float,
    rows: Sequence[tuple[dict[str, Any], bool]],
    full: float,
) -> Cell:
    exact = [row["exact"] for row, _ in rows]
    retained = [row["exact"] for row, full_is_right in rows if full_is_right]
    return Cell(
        suite,
        variant,
        budget,
        len(rows),
        _mean(exact),
        *wilson_interval(sum(exact), len(exact)),
        _mean(exact) / full if full else None,
        len(retained),
        _mean(retained),
        *wilson_interval(sum(retained), len(retained)),
        **_averages([row for row, _ in rows]),
    )


def _means(cells: Sequence[Cell]) -> list[Cell]:
    """The macro averages; the ratio is that of the averages. Intervals: those of the suites, square
    and add (Zou and Donner, 2008)."""
    groups: dict[tuple[str, float], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.variant, cell.budget].append(cell)
    full = _mean([c.exact for c in groups[FULL, 1.0]])
    means = []
    for (variant, budget), found in groups.items():
        kept = [c for c in found if c.retained is not None]
        exact = _mean([c.exact for c in found])
        means.append(
            Cell(
                MEAN,
                variant,
                budget,
                sum(c.num_items for c in found),
                exact,
                *_interval([(c.exact, c.exact_low, c.exact_high) for c in found]),
                exact / full if full else None,
                sum(c.num_full for c in found),
                _mean([c.retained for c in kept]),
                *_interval([(c.retained, c.retained_low, c.retained_high) for c in kept]),
                **_averages([vars(c) for c in found]),
            )
        )
    return means


def _interval(shares: Sequence[tuple[float | None, float, float]]) -> tuple[float, float]:
    """The 95 % interval of a mean of independent shares, each with its own interval."""
    if not shares:
        return 0.0, 1.0
    known = [(share or 0.0, low, high) for share, low, high in shares]
    mean = sum(share for share, _, _ in known) / len(known)
    below = math.hypot(*(share - low for share, low, _ in known)) / len(known)
    above = math.hypot(*(high - share for share, _, high in known)) / len(known)
    return max(mean - below, 0.0), min(mean + above, 1.0)


def _averages(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fields of a cell that are means, without intervals."""
    names = ("anls", "agreement", "hit_rate", "kv_bytes")
    return {name: _mean([x[name] for x in found if x[name] is not None]) for name in names}


def _mean(values: Sequence[Any]) -> Any:
    """None of nothing."""
    return sum(values) / len(values) if values else None


def pick(cells: Iterable[Cell], suite: str, variant: str, budget: float) -> Cell | None:
    """The cell of these names, or None where it was not measured."""
    return next(
        (c for c in cells if (c.suite, c.variant, c.budget) == (suite, variant, budget)), None
    )


def names(results: Iterable[Any], key: str) -> list[Any]:
    """The different values of a field, in the order in which they come."""
    return list(dict.fromkeys(getattr(result, key) for result in results))
