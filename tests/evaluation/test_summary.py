"""From items to cells, and from cells to a page and pictures."""

import pytest

from vlcache_triton.apps.evaluation import MEAN, report, summarise
from vlcache_triton.apps.evaluation.metrics import wilson_interval
from vlcache_triton.apps.evaluation.summary import names, pick


def row(variant, budget, exact, hit_rate=0.5):
    return dict(
        variant=variant,
        budget=budget,
        text="",
        exact=exact,
        anls=float(exact),
        agreement=0.25,
        hit_rate=hit_rate,
        kv_bytes=1000 * budget,
    )


def result(suite, index, full, compressed, hit_rate=0.5):
    rows = [row("full", 1.0, full, 1.0)]
    for variant in ("vl_cache", "all rows, uniform"):
        rows += [row(variant, budget, compressed, hit_rate) for budget in (0.05, 0.1)]
    return {"suite": suite, "index": index, "answers": ["x"], "prompt_tokens": 9, "rows": rows}


RESULTS = [
    result("value", 0, True, True),
    result("value", 1, True, False),
    result("value", 2, False, True, hit_rate=None),
    result("count", 0, False, False),
]


def test_cells():
    cells = summarise(RESULTS)
    assert names(cells, "suite") == ["value", "count", MEAN]
    cell = pick(cells, "value", "vl_cache", 0.1)
    assert (cell.num_items, cell.num_full) == (3, 2)
    assert cell.exact == pytest.approx(2 / 3) and cell.retained == 0.5
    assert cell.ratio == pytest.approx(1.0)  # one lost, and one that the full cache has wrong
    assert (cell.exact_low, cell.exact_high) == pytest.approx(wilson_interval(2, 3))
    assert (cell.retained_low, cell.retained_high) == wilson_interval(1, 2)
    assert cell.hit_rate == 0.5  # an answer of one token has none
    assert (cell.anls, cell.agreement, cell.kv_bytes) == (pytest.approx(2 / 3), 0.25, 100)
    nothing = pick(cells, "count", "vl_cache", 0.1)
    assert nothing.retained is None and nothing.ratio is None and nothing.num_full == 0
    assert pick(cells, "count", "vl_cache", 0.3) is None


def test_the_mean_weighs_tasks_alike():
    """Not by how many items they have, nor by how many the full cache answers."""
    results = [result("a", i, True, i > 0) for i in range(9)]
    results += [result("b", i, i > 0, False) for i in range(2)]
    cells = summarise(results)
    full, kept = (pick(cells, MEAN, name, b) for name, b in (("full", 1.0), ("vl_cache", 0.1)))
    assert (full.num_items, full.exact) == (11, (1 + 1 / 2) / 2)
    assert kept.exact == pytest.approx((8 / 9 + 0) / 2)
    assert kept.ratio == pytest.approx((8 / 9 / 2) / (3 / 4))
    assert kept.retained == pytest.approx((8 / 9 + 0) / 2) and kept.num_full == 10
    assert kept.exact_low < kept.exact < kept.exact_high
    parts = [pick(cells, name, "vl_cache", 0.1) for name in ("a", "b")]
    below = sum((c.exact - c.exact_low) ** 2 for c in parts) ** 0.5 / 2
    assert kept.exact - kept.exact_low == pytest.approx(below)


def test_a_task_that_the_full_cache_cannot_do_does_not_count_among_the_kept():
    cell = pick(summarise(RESULTS), MEAN, "vl_cache", 0.1)
    assert cell.retained == 0.5 and cell.exact == pytest.approx(1 / 3)


def test_a_single_suite_has_no_mean():
    assert names(summarise(RESULTS[:3]), "suite") == ["value"]


def test_the_page_shows_tasks_first_then_their_mean():
    page = report(summarise(RESULTS), {"model": "form-reader", "date": "2026-01-01"})
    assert "- model: form-reader" in page
    assert "| value | 3 | 0.667 (0.208 to 0.939) |" in page
    assert "| kept | 5% | 10% |" in page
    assert "| vl_cache | 0.500 | 0.500 |" in page
    assert "| uniform layers | all-row scores | 0.500 (0.095 to 0.905) |" in page
    assert page.count("## Task: ") == 2 and "## The mean of the tasks" in page
    assert page.index("## Task by task") < page.index("## Every policy")
    assert page.index("## Task: count") < page.index("## The mean of the tasks")
    small = page[page.index("## Every policy") : page.index("## Ablation")]
    assert "| vl_cache | 0.500 (0.095 to 0.905) | 0.500 (0.095 to 0.905) |\n" in small
    assert "all rows" not in small and "full |" not in small


def test_the_floor_stands_beside_what_it_is_the_floor_of():
    """With a row where that has one; and the accuracy ratio behind the share that is kept."""
    first = [row("full", 1.0, True), row("random", 0.1, False), row("vl_cache", 0.1, True)]
    second = [row("random, a row", 0.1, True), row("tuned", 0.1, True), row("tuned", 0.2, False)]
    results = [{**result(x, 0, True, True), "rows": first + second} for x in ("value", "list")]
    lines = report(summarise(results), {}).splitlines()
    without = lines.index("| at 10% | right with all | random | vl_cache |")
    assert lines[without + 2 : without + 5] == [
        "| value | 1 of 1 | 0.00 (0.00) | 1.00 (1.00) |",
        "| list | 1 of 1 | 0.00 (0.00) | 1.00 (1.00) |",
        "| mean of the tasks | 2 of 2 | 0.00 (0.00) | 1.00 (1.00) |",
    ]
    having = lines.index("| at 10% | right with all | random, a row | tuned |")
    assert lines[having + 2] == "| value | 1 of 1 | 1.00 (1.00) | 1.00 (1.00) |"
    assert "| at 20% | right with all | tuned |" in lines


@pytest.mark.parametrize(("budget", "heading"), [(0.1, "10%"), (0.3, "30%"), (0.125, "12.5%")])
def test_the_tables_of_one_budget_show_that_budget_only(budget, heading):
    """Whether it is one of those that the tables of many budgets are cut to, or another."""
    variants = ("vl_cache", "snapkv", "all rows, uniform")
    rows = [row("full", 1.0, True, 1.0), *(row(name, budget, True, 1.0) for name in variants)]
    page = report(summarise([{**result("s", 0, True, True), "rows": rows}]), {})
    heads = [line for line in page.splitlines() if line.startswith(("| kept", "| layers"))]
    assert len(heads) == 2 + 5  # every policy, the ablation, five curves
    assert set(heads) == {f"| kept | {heading} |", f"| layers | scores | {heading} |"}
    assert "| snapkv | 1.000 (0.207 to 1.000) |" in page


def test_the_page_of_what_only_the_full_cache_was_asked():
    only_full = [{**result("s", 0, True, True), "rows": [row("full", 1.0, True, 1.0)]}]
    page = report(summarise(only_full), {})
    assert "## The full cache" in page and "## Ablation" not in page
