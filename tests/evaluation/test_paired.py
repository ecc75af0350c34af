"""Differences within items, and their intervals."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy"


@pytest.fixture(scope="module")
def paired():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("paired")
        del sys.modules["paired"]


def item(full, **right):
    rows = [{"variant": "full", "budget": 1.0, "exact": full}]
    rows += [{"variant": k, "budget": 0.1, "exact": x} for k, x in right.items()]
    return {"rows": rows}


def test_items_that_the_full_cache_gets_wrong_do_not_count(paired):
    results = [item(True, a=True), item(False, a=True), item(True, a=False)]
    assert paired.survivals(results, "a", 0.1).tolist() == [1.0, 0.0]


def test_an_interval_holds_its_mean_and_narrows(paired):
    few, many = (np.tile([1.0, 1.0, 0.0, 1.0], n) for n in (5, 100))
    mean, low, high = paired.difference(few, np.zeros(20))
    assert mean == 0.75 and 0.5 < low < 0.75 < high < 1.0
    _, closer, _ = paired.difference(many, np.zeros(400))
    assert low < closer < 0.75
    assert paired.difference(few, np.zeros(20)) == (mean, low, high)


def test_pairs_that_always_agree_have_no_spread(paired):
    assert paired.difference(np.ones(9), np.ones(9)) == (0.0, 0.0, 0.0)


def test_the_table_names_every_pair(paired):
    names = {x for pair in paired.PAIRS.values() for x in pair}
    rows = [{"variant": "full", "budget": 1.0, "exact": True}]
    rows += [
        {"variant": x, "budget": b, "exact": x == "vl_cache"} for x in names for b in paired.BUDGETS
    ]
    lines = paired.table([{"rows": rows}] * 4).splitlines()
    assert len(lines) == 2 + len(paired.PAIRS)
    assert "| VL-Cache - SnapKV | +100.0 (100.0 to 100.0) |" in lines[-1]
    assert "| tuned - VL-Cache | -100.0 (-100.0 to -100.0) |" in lines[-3]
