"""The miniature: its pages say what is asked, and the whole of it runs, tiny."""

import json
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

from vlcache_triton.apps.evaluation import decode
from vlcache_triton.apps.evaluation.run import read_results

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy"))

import form_batches
import miniature

SIZES = ((2, 6, 80), (1, 6, 20))  # steps, pages a step, tokens of text a page


def words(cells):
    return ["".join(chr(32 + c) for c in cell).strip() for cell in cells.reshape(-1, 4)]


def drawn(design, index, num_pages=1, num_drawn=0, steps=0):
    forms = miniature.DESIGNS[design]({}, 6, 80, 0)
    forms.num_drawn, forms.steps = num_drawn, steps
    rng = Random(index)
    cells, free, questions = forms.draw_document(rng, num_pages)
    form_batches.fill(np.random.default_rng(index), cells[None], free[None])
    return cells, questions


@pytest.mark.parametrize("design", miniature.DESIGNS)
@pytest.mark.parametrize(("num_pages", "begun"), [(1, 0), (1, 9), (3, 9), (1, None), (3, None)])
def test_the_answers_are_on_the_pages(design, num_pages, begun):
    """At the beginning of the first phase, behind it, and in the second."""
    phase = {} if begun is None else {"num_drawn": begun, "steps": 10}
    for index in range(20):
        cells, questions = drawn(design, index, num_pages, **phase)
        assert cells.shape == (num_pages, 12, 12, 4)
        seen = words(cells)
        places = [i for i, word in enumerate(seen) if word.endswith(":")]
        values = {seen[i][:-1]: seen[i + 1] for i in places}
        assert {q.text.split()[-1][:-1]: q.answer for q in questions} == values
        assert all(len(v) == 3 and v.isdigit() for v in values.values())
        if begun != 0:
            assert len(places) == len(values)  # one copy of each
        if begun is None:
            assert len(places) == 1


def test_designs_differ_in_what_is_blank():
    blank = {
        design: [float((~drawn(design, i)[0].any(-1)).mean()) for i in range(200)]
        for design in miniature.DESIGNS
    }
    assert 0.88 < np.mean(blank["blank-heavy"]) < 0.94 and min(blank["blank-heavy"]) > 0.6
    assert min(blank["varied"]) < 0.2 and max(blank["varied"]) > 0.9


def test_copies_become_fewer_and_fields_more():
    forms = miniature.Varied({}, 6, 80, 0)
    assert forms.stage() == (1, 1)
    forms.steps = 100
    stages = []
    for forms.num_drawn in range(101):
        stages.append(forms.stage())
    assert list(dict.fromkeys(stages)) == list(miniature.STAGES)
    assert stages.count(miniature.STAGES[-1]) > 65


def test_all_of_it_tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "end_tokens", lambda model: {10**6})  # answers last
    counts = miniature.miniature(tmp_path, SIZES, num_pages=2, seed=0)
    assert json.loads((tmp_path / "miniature.json").read_text()) == counts
    lines = (tmp_path / "miniature.md").read_text().splitlines()
    assert len(lines) == 2 + 8 * 5  # trained on x asked about, by policies
    results = read_results(tmp_path / "results.jsonl")
    assert len(results) == 16 and len(counts["shares"]) == 8
    for result in results:
        assert len(result["rows"]) == 1 + 5 * len(miniature.BUDGETS)
        assert 0 <= result["attention_to_blanks"] <= 1
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/train.jsonl")}
    assert len(logs) == 2 + 4  # two first phases, each with two second ones
    assert miniature.miniature(tmp_path, SIZES, num_pages=2, seed=0)["cells"] == counts["cells"]
    assert logs == {path: path.stat().st_mtime_ns for path in logs}
