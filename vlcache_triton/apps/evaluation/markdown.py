"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .summary import MEAN, Cell, names, pick
from .variants import (
    FLOOR,
    FULL,
    ORACLE,
    OURS,
    PAPER,
    PAPER_BY_LAYER,
    PEER,
    WITH_ROW,
)

#: What each variant of the ablation has of the paper's two ideas.
ABLATION = {
    PAPER: ("sparsity-aware layers", "post-vision scores"),
    "all rows, sparsity-aware": ("sparsity-aware layers", "all-row scores"),
    "post-vision, uniform": ("uniform layers", "post-vision scores"),
    "all rows, uniform": ("uniform layers", "all-row scores"),
}
LEFT_OUT = {*ABLATION} - {PAPER} | {FULL}  # where rivals are compared
ABLATION_BUDGETS = (0.05, 0.1, 0.2, 0.4)
SMALL_BUDGETS = (0.05, 0.1, 0.2)
#: What the first tables have room for: without a row for what is evicted, and with one.
FIRST = (FLOOR, PAPER, PAPER_BY_LAYER, PEER, ORACLE)
FIRST_WITH_ROW = (*(name + WITH_ROW for name in FIRST[:-1]), OURS, ORACLE + WITH_ROW)


def report(cells: Sequence[Cell], about: dict[str, Any]) -> str:
    """A page: what was measured, the full cache by task, the tasks at small budgets and their mean,
    all variants, the ablation, then curves as tables.

    Args:
        cells: as `summarise` returns them.
        about: what to say of the run: model, date, machine, versions.
    """
    suites = names(cells, "suite")
    parts = ["# Accuracy under compression", _about(about), _full(cells), *_by_task(cells)]
    parts += [_rivals(cells, suites[-1]), _ablation(cells, suites[-1])]
    parts += [_curves(cells, suite) for suite in suites]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(about: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in about.items())


def _full(cells: Sequence[Cell]) -> str:
    """What the full cache answers."""
    rows = [
        [
            cell.suite,
            str(cell.num_items),
            f"{cell.exact:.3f} ({cell.exact_low:.3f} to {cell.exact_high:.3f})",
            f"{cell.anls:.3f}",
            f"{cell.kv_bytes / 1e6:.2f}",
        ]
        for cell in cells
        if cell.variant == FULL
    ]
    head = ["task", "items", "exact match (95 %)", "ANLS", "KV cache, MB"]
    return "## The full cache\n\n" + table(head, rows)


def _by_task(cells: Sequence[Cell]) -> list[str]:
    """For each small budget two tables, without a row and with one: tasks by variants, the floor
    first."""
    tables = [
        _tasks_at(cells, budget, variants)
        for budget in _measured(cells, SMALL_BUDGETS)
        for variants in (FIRST, FIRST_WITH_ROW)
    ]
    if not any(tables):
        return []
    said = (
        "Kept of right, exact matches among the items that the full cache answers right; in"
        f" brackets the accuracy ratio, exact matches over the full cache's. {FLOOR!r}, what is"
        " guessed from tokens drawn at random, is the floor of what stands beside it."
        f" {ORACLE!r} ranks tokens by what the answer did attend to, which is no upper bound."
    )
    return ["## Task by task", said, *tables]


def _tasks_at(cells: Sequence[Cell], budget: float, variants: Sequence[str]) -> str:
    found = [v for v in variants if any((c.variant, c.budget) == (v, budget) for c in cells)]
    if not found:
        return ""
    rows = []
    for suite in names(cells, "suite"):
        full = pick(cells, suite, FULL, 1.0)
        assert full is not None
        row = [pick(cells, suite, variant, budget) for variant in found]
        of = f"{full.num_full} of {full.num_items}"
        rows.append([suite, of, *(_kept_and_ratio(cell) for cell in row)])
    return table([f"at {percent(budget)}", "right with all", *found], rows)


def _kept_and_ratio(cell: Cell | None) -> str:
    if cell is None or cell.retained is None or cell.ratio is None:
        return ""
    return f"{cell.retained:.2f} ({cell.ratio:.2f})"


def _curves(cells: Sequence[Cell], suite: str) -> str:
    """Tables of one task, variants by budgets."""
    here = [c for c in cells if c.suite == suite and c.variant != FULL]
    if not here:
        return ""
    full = pick(cells, suite, FULL, 1.0)
    assert full is not None
    title = "The mean of the tasks" if suite == MEAN else f"Task: {suite}"
    parts = [f"## {title}", f"{full.num_items} items; full cache {full.exact:.3f} exact."]
    budgets = sorted(names(here, "budget"))
    variants = {variant: [variant] for variant in names(here, "variant")}

    def shown(name: str) -> str:
        number = partial(_number, name)
        return _by_budget(here, suite, budgets, ["kept"], variants, number)

    if full.num_full:
        of = f"the {full.num_full} items that the full cache answers right"
        parts += [f"Exact match among {of}:", shown("retained")]
        parts += ["Accuracy ratio:", shown("ratio")]
    parts += ["ANLS:", shown("anls")]
    parts += ["Tokens that agree with the full cache's:", shown("agreement")]
    parts += ["Cache hit rate:", shown("hit_rate")]
    return "\n\n".join(parts)


def _rivals(cells: Sequence[Cell], suite: str) -> str:
    """Every variant but the ablation's cells, with intervals."""
    budgets = _measured(cells, SMALL_BUDGETS)
    rivals = {v: [v] for v in names(cells, "variant") if v not in LEFT_OUT}
    found = _by_budget(cells, suite, budgets, ["kept"], rivals, _interval)
    return f"## Every policy\n\n{_what_is_counted(suite)}\n\n{found}" if found else ""


def _ablation(cells: Sequence[Cell], suite: str) -> str:
    """The two ideas of the paper, on and off."""
    budgets = _measured(cells, ABLATION_BUDGETS)
    found = _by_budget(cells, suite, budgets, ["layers", "scores"], ABLATION, _interval)
    said = f"{_what_is_counted(suite)} All-row cells take the layers' sparsity from all rows, too."
    return f"## Ablation\n\n{said}\n\n{found}" if found else ""


def _measured(cells: Sequence[Cell], preferred: Sequence[float]) -> list[float]:
    """The budgets that a table has room for, or where none of them was measured, all that were."""
    found = sorted(budget for budget in names(cells, "budget") if budget < 1)
    return [budget for budget in found if budget in preferred] or found


def _what_is_counted(suite: str) -> str:
    of = "in the mean of the tasks, each weighing alike" if suite == MEAN else f"of {suite!r}"
    return f"Kept of right (95 % interval), {of}."


def _by_budget(
    cells: Sequence[Cell],
    suite: str,
    budgets: Sequence[float],
    head: Sequence[str],
    variants: Mapping[str, Sequence[str]],
    text: Callable[[Cell], str],
) -> str:
    """A row for each variant that was measured at any budget; what it begins with is under `head`.
    Nothing where there is no row."""
    rows = []
    for variant, labels in variants.items():
        found = [pick(cells, suite, variant, budget) for budget in budgets]
        if any(found):
            rows.append([*labels, *("" if cell is None else text(cell) for cell in found)])
    return table([*head, *map(percent, budgets)], rows) if rows else ""


def _interval(cell: Cell) -> str:
    if cell.retained is None:
        return ""
    return f"{cell.retained:.3f} ({cell.retained_low:.3f} to {cell.retained_high:.3f})"


def percent(share: float) -> str:
    """0.05 as "5%"."""
    return f"{100 * share:.3g}%"


def _number(name: str, cell: Cell) -> str:
    value = getattr(cell, name)
    return "" if value is None else f"{value:.3f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
