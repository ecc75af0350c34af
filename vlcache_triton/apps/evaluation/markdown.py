"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .summary import ALL_SUITES, Cell, names, pick

ABLATION = {
    ("sparsity-aware layers", "post-vision scores"): "vl_cache",
    ("sparsity-aware layers", "all-row scores"): "all rows, sparsity-aware",
    ("uniform layers", "post-vision scores"): "post-vision, uniform",
    ("uniform layers", "all-row scores"): "all rows, uniform",
}
ABLATION_BUDGETS = (0.05, 0.1, 0.2, 0.4)
RIVAL_BUDGETS = (0.05, 0.1, 0.2)


def report(cells: Sequence[Cell], about: dict[str, Any]) -> str:
    """A page: what was measured, the full cache by suite, all variants at small budgets, the
    ablation, then curves as tables.

    Args:
        cells: as `summarise` returns them.
        about: what to say of the run: model, date, machine, versions.
    """
    suites = names(cells, "suite")
    first = ALL_SUITES if ALL_SUITES in suites else suites[0]
    parts = ["# Accuracy under compression", _about(about), _full(cells)]
    parts += [_rivals(cells, first), _ablation(cells, first), _curves(cells, first)]
    parts += [_curves(cells, suite) for suite in suites if suite != first]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(about: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in about.items())


def _full(cells: Sequence[Cell]) -> str:
    """What the full cache can do, which is the ceiling of everything else."""
    rows = [
        [
            cell.suite,
            str(cell.num_items),
            f"{cell.exact:.3f} ({cell.exact_low:.3f} to {cell.exact_high:.3f})",
            f"{cell.anls:.3f}",
            f"{cell.kv_bytes / 1e6:.2f}",
        ]
        for cell in cells
        if cell.variant == "full"
    ]
    head = ["suite", "items", "exact match (95 %)", "ANLS", "KV cache, MB"]
    return "## The full cache\n\n" + _table(head, rows)


def _curves(cells: Sequence[Cell], suite: str) -> str:
    """Tables of one suite, variants by budgets."""
    here = [c for c in cells if c.suite == suite and c.variant != "full"]
    if not here:
        return ""
    full = pick(cells, suite, "full", 1.0)
    assert full is not None
    title = "All suites" if suite == ALL_SUITES else f"Suite: {suite}"
    parts = [f"## {title}", f"{full.num_items} items; full cache {full.exact:.3f} exact."]
    if full.num_full:
        parts.append(
            f"Exact match among the {full.num_full} items that the full cache answers right:"
        )
        parts.append(_by_budget(here, lambda c: _number(c.retained)))
    parts += ["ANLS:", _by_budget(here, lambda c: _number(c.anls))]
    parts += ["Tokens that agree with the full cache's:"]
    parts.append(_by_budget(here, lambda c: _number(c.agreement)))
    parts += ["Cache hit rate:", _by_budget(here, lambda c: _number(c.hit_rate))]
    return "\n\n".join(parts)


def _rivals(cells: Sequence[Cell], suite: str) -> str:
    """Every variant but the ablation's cells, with intervals."""
    left_out = {*ABLATION.values()} - {"vl_cache"} | {"full"}
    budgets = _measured(cells, RIVAL_BUDGETS)
    rows = []
    for variant in names(cells, "variant"):
        found = [pick(cells, suite, variant, budget) for budget in budgets]
        if variant not in left_out and any(found):
            rows.append([variant, *(_interval(cell) for cell in found)])
    if not rows:
        return ""
    head = ["kept", *(_percent(budget) for budget in budgets)]
    return "\n\n".join(["## Every policy", _what_is_counted(suite), _table(head, rows)])


def _ablation(cells: Sequence[Cell], suite: str) -> str:
    """The two ideas of the paper, on and off."""
    budgets = _measured(cells, ABLATION_BUDGETS)
    rows = []
    for (layers, scores), variant in ABLATION.items():
        found = [pick(cells, suite, variant, budget) for budget in budgets]
        if any(found):
            rows.append([layers, scores, *(_interval(cell) for cell in found)])
    if not rows:
        return ""
    head = ["layers", "scores", *(_percent(budget) for budget in budgets)]
    return "\n\n".join(
        [
            "## Ablation",
            _what_is_counted(suite)
            + " All-row cells take the layers' sparsity from all rows, too.",
            _table(head, rows),
        ]
    )


def _measured(cells: Sequence[Cell], preferred: Sequence[float]) -> list[float]:
    """The budgets that a table has room for, or where none of them was measured, all that were."""
    found = sorted(budget for budget in names(cells, "budget") if budget < 1)
    return [budget for budget in found if budget in preferred] or found


def _what_is_counted(suite: str) -> str:
    return (
        f"Exact match (95 % Wilson interval) among the items of suite {suite!r} that the full cache"
        " answers right."
    )


def _by_budget(cells: Sequence[Cell], text: Callable[[Cell], str]) -> str:
    budgets = sorted(names(cells, "budget"))
    rows = []
    for variant in names(cells, "variant"):
        found = [pick(cells, cells[0].suite, variant, budget) for budget in budgets]
        rows.append([variant, *("" if cell is None else text(cell) for cell in found)])
    return _table(["kept", *(_percent(budget) for budget in budgets)], rows)


def _interval(cell: Cell | None) -> str:
    if cell is None or cell.retained is None:
        return ""
    return f"{cell.retained:.3f} ({cell.retained_low:.3f} to {cell.retained_high:.3f})"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
