"""Differences within items, and their intervals."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vlcache_triton.apps.evaluation import compare_all
from vlcache_triton.apps.evaluation.variants import with_profile
from vlcache_triton.recipe.profile import read_profile

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
    return {"suite": "value", "rows": rows}


def test_items_that_the_full_cache_gets_wrong_do_not_count(paired):
    results = [item(True, a=True), item(False, a=True), item(True, a=False)]
    (task,) = paired.survivals(results, "a", 0.1)
    assert task.tolist() == [1.0, 0.0]


def test_an_interval_holds_its_mean_and_narrows(paired):
    few, many = (np.tile([1.0, 1.0, 0.0, 1.0], n) for n in (5, 100))
    mean, low, high = paired.difference([few], [np.zeros(20)])
    assert mean == 0.75 and 0.5 < low < 0.75 < high < 1.0
    _, closer, _ = paired.difference([many], [np.zeros(400)])
    assert low < closer < 0.75
    assert paired.difference([few], [np.zeros(20)]) == (mean, low, high)


def test_pairs_that_always_agree_have_no_spread(paired):
    assert paired.difference([np.ones(9)], [np.ones(9)]) == (0.0, 0.0, 0.0)


def test_every_task_weighs_alike(paired):
    """However many of its items the full cache answers."""
    results = [item(True, a=True, b=False)] * 30
    results += [dict(item(True, a=False, b=False), suite="list")] * 2
    mean, low, high = paired.difference(*(paired.survivals(results, x, 0.1) for x in "ab"))
    assert (mean, low, high) == (0.5, 0.5, 0.5)


def test_the_table_names_every_pair(paired):
    names = {x for pair in paired.PAIRS.values() for x in pair}
    rows = [{"variant": "full", "budget": 1.0, "exact": True}]
    rows += [
        {"variant": x, "budget": b, "exact": x == "vl_cache"} for x in names for b in paired.BUDGETS
    ]
    lines = paired.table([{"suite": "value", "rows": rows}] * 4).splitlines()
    assert len(lines) == 2 + len(paired.PAIRS)
    assert "| VL-Cache - SnapKV | +100.0 (100.0 to 100.0) |" in lines[-1]
    assert any("| tuned - VL-Cache | -100.0 (-100.0 to -100.0) |" in line for line in lines)


def test_the_pairs_are_of_what_eval_compares(paired):
    """With the row and without, both readings of the paper, tuned peers: by the names they have."""
    compared = {v.name for v in compare_all(0.1, torch.ones(1, 1, 1))}
    profile = read_profile(FOLDER.parent / "results" / "accuracy" / "calibration_tuned.json")
    compared |= {v.name for v in with_profile(profile, 0.1)}
    assert {x for pair in paired.PAIRS.values() for x in pair} <= compared
    assert [name for name in paired.PAIRS if "a row" in name]


def test_what_was_not_measured_is_left_out(paired):
    lines = paired.table([item(True, vl_cache=True, snapkv=False)]).splitlines()
    assert lines[0] == "| survive | 10% |" and len(lines) == 3
    assert lines[2] == "| VL-Cache - SnapKV | +100.0 (100.0 to 100.0) |"
