"""From items to cells, and from cells to a page and pictures."""

import pytest

from vlcache_triton.apps.evaluation import report, summarise
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
    assert names(cells, "suite") == ["value", "all", "count"]
    cell = pick(cells, "value", "vl_cache", 0.1)
    assert (cell.num_items, cell.num_full) == (3, 2)
    assert cell.exact == pytest.approx(2 / 3) and cell.retained == 0.5
    assert (cell.exact_low, cell.exact_high) == wilson_interval(2, 3)
    assert (cell.retained_low, cell.retained_high) == wilson_interval(1, 2)
    assert cell.hit_rate == 0.5  # an answer of one token has none
    assert (cell.anls, cell.agreement, cell.kv_bytes) == (pytest.approx(2 / 3), 0.25, 100)
    everything = pick(cells, "all", "full", 1.0)
    assert (everything.num_items, everything.exact) == (4, 0.5)
    nothing = pick(cells, "count", "vl_cache", 0.1)
    assert nothing.retained is None and nothing.num_full == 0
    assert pick(cells, "count", "vl_cache", 0.3) is None


def test_a_single_suite_has_no_total():
    assert names(summarise(RESULTS[:3]), "suite") == ["value"]


def test_the_page_shows_full_cache_curves_and_ablation():
    page = report(summarise(RESULTS), {"model": "form-reader", "date": "2026-01-01"})
    assert "- model: form-reader" in page
    assert "| value | 3 | 0.667 (0.208 to 0.939) |" in page
    assert "| kept | 5% | 10% |" in page
    assert "| vl_cache | 0.500 | 0.500 |" in page
    assert "| uniform layers | all-row scores | 0.500 (0.095 to 0.905) |" in page
    assert page.count("## Suite: ") == 2 and "## All suites" in page
    small = page[page.index("## Every policy") : page.index("## Ablation")]
    assert "| vl_cache | 0.500 (0.095 to 0.905) | 0.500 (0.095 to 0.905) |\n" in small
    assert "all rows" not in small and "full |" not in small


@pytest.mark.parametrize(("budget", "heading"), [(0.1, "10%"), (0.3, "30%"), (0.125, "12.5%")])
def test_the_tables_of_one_budget_show_that_budget_only(budget, heading):
    """Whether it is one of those that the tables of many budgets are cut to, or another."""
    variants = ("vl_cache", "snapkv", "all rows, uniform")
    rows = [row("full", 1.0, True, 1.0), *(row(name, budget, True, 1.0) for name in variants)]
    page = report(summarise([{**result("s", 0, True, True), "rows": rows}]), {})
    heads = [line for line in page.splitlines() if line.startswith(("| kept", "| layers"))]
    assert len(heads) == 2 + 4  # every policy, the ablation, four curves
    assert set(heads) == {f"| kept | {heading} |", f"| layers | scores | {heading} |"}
    assert "| snapkv | 1.000 (0.207 to 1.000) |" in page


def test_the_page_of_what_only_the_full_cache_was_asked():
    only_full = [{**result("s", 0, True, True), "rows": [row("full", 1.0, True, 1.0)]}]
    page = report(summarise(only_full), {})
    assert "## The full cache" in page and "## Ablation" not in page
