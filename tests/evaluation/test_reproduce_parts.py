"""Parts are made once, prompts grow as they should, and each choice of the recipe is one field."""

import json

import pytest
import torch

from vlcache_triton.apps.evaluation import Query
from vlcache_triton.apps.reproduce import ABLATED, Findings, Parts, Score, ablated, write_page
from vlcache_triton.apps.reproduce.latency import Ticks, _repeated, _stretched, measure_latency
from vlcache_triton.apps.reproduce.lmms import lmms_scores
from vlcache_triton.apps.reproduce.sparsity import measure_sparsity
from vlcache_triton.recipe.config import VLCacheConfig


def test_a_part_is_measured_once(tmp_path):
    parts, calls = Parts(tmp_path / "out"), []

    def measure():
        calls.append(1)
        return {"x": (1, 2)}

    assert parts.get("a/b", measure) == parts.get("a/b", measure) == {"x": [1, 2]}
    assert calls == [1] and json.loads(parts.path("a/b").read_text()) == {"x": [1, 2]}


def test_a_part_that_was_cut_off_is_not_there(tmp_path):
    parts = Parts(tmp_path)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.get("a", interrupted)
    parts.path("b").with_suffix(".part").write_text("[1, ")  # the machine stopped while writing
    assert parts.get("a", lambda: 1) == 1 and parts.get("b", lambda: [2]) == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_each_choice_is_changed_alone():
    paper = VLCacheConfig(budget=0.2)
    for variant in ablated(0.2):
        name, _, value = variant.name.partition("=")
        changed = {
            f: getattr(variant.config, f)
            for f in vars(paper)
            if getattr(variant.config, f) != getattr(paper, f)
        }
        assert changed in ({}, {name: getattr(variant.config, name)})
        assert str(getattr(variant.config, name)) == value
    for name, values in ABLATED.items():
        assert getattr(paper, name) in values


def test_text_goes_before_the_image_and_all_that_has_a_value_a_token_grows():
    ids = torch.tensor([[1, 9, 9, 5, 6]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 9).int(),
        "pixel_values": torch.rand(1, 3, 4, 4),
        "image_grid_thw": torch.tensor([[1, 2, 1]]),
    }
    longer = _repeated(_stretched(inputs, 8), 2)
    assert longer["input_ids"].tolist() == [[1, 6, 6, 6, 9, 9, 5, 6]] * 2
    assert longer["attention_mask"].tolist() == [[1] * 8] * 2
    assert longer["mm_token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0]] * 2
    assert longer["pixel_values"].shape == (2, 3, 4, 4)
    assert longer["image_grid_thw"].shape == (2, 3)
    assert torch.equal(_stretched(inputs, 3)["input_ids"], ids)


def test_the_sparsity_of_decoding_is_that_of_eager_attention(form_reader, value_query, eager_maps):
    model, (query, answer) = form_reader[0], value_query
    (found,) = measure_sparsity(model, [(query, 9)])["decoding"]
    ids = torch.cat([query.inputs["input_ids"], torch.tensor([answer[:-1]])], 1)
    rows = len(answer) - 1
    for sparsity, attention in zip(found, eager_maps(query, ids), strict=True):
        last = attention[0, :, -rows:]
        visible = torch.ones(rows, ids.shape[1]).tril(ids.shape[1] - rows).bool()
        passes = (last >= 0.01 * last.amax(-1, keepdim=True)) & visible
        expected = 1 - passes.sum((1, 2)).double().mean() / visible.sum()
        assert sparsity == pytest.approx(float(expected), abs=2e-3)


@pytest.fixture(scope="module")
def value_query(form_reader):
    """A question whose answer is several tokens long, and that answer."""
    from vlcache_triton.apps.evaluation import SUITES, encode_form, form_item

    model, processor = form_reader
    item = form_item(SUITES[0], 1)
    query = encode_form(processor, item, model.device)
    tokens = model.generate(**query.inputs, max_new_tokens=9, do_sample=False)
    answer = tokens[0, query.inputs["input_ids"].shape[1] :].tolist()
    assert len(answer) > 1 and isinstance(query, Query)
    return query, answer


@pytest.mark.parametrize(
    ("task", "found", "expected"),
    [
        ("docvqa_val", {"anls,none": 0.5, "anls_stderr,none": "N/A"}, ("anls", 0.5, None)),
        ("other", {"alias": "other", "acc_stderr,none": 0.1, "acc,none": 1}, ("acc", 1.0, 0.804)),
    ],
)
def test_a_score_is_the_tasks_own_metric(tmp_path, task, found, expected):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": {task: found}}))
    score = lmms_scores(task, "tuned", 0.1, path)
    metric, value, low = expected
    assert score[:5] == (task, "tuned", 0.1, metric, value)
    assert score.low == (None if low is None else pytest.approx(low, abs=1e-3))


def test_results_without_a_number_are_named(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": {"x": {"alias": "x", "acc,none": "N/A"}}}))
    with pytest.raises(ValueError, match="got no number for 'x' among"):
        lmms_scores("x", "full", 1.0, path)


def test_a_page_of_what_there_is(tmp_path):
    scores = [Score("docvqa", "full", 1.0, "anls", 0.7, None, None)]
    scores += [Score("docvqa", "tuned", b, "anls", b, 0.0, 1.0) for b in (0.05, 0.1)]
    page = write_page(Findings({"model": "m"}, accuracy=scores, failed=["a: why"]), tmp_path)
    assert page == (tmp_path / "report.md").read_text()
    assert "**docvqa**, anls; with the full cache 0.700." in page
    assert "| tuned | 0.050 (0.00 to 1.00) | 0.100 (0.00 to 1.00) |" in page
    assert page.endswith("## Not measured\n\n- a: why\n")
    assert [path.name for path in tmp_path.glob("*.png")] == ["accuracy-by-budget.png"]


def test_the_time_of_a_token_leaves_out_where_the_loop_reads_back_late():
    ticks = Ticks()
    # The first ones come late, the last four at once.
    ticks.at = [5.0] * 8 + [5.0 + 0.25 * i for i in range(40)] + [14.9] * 4
    assert ticks.seconds_a_token() == 0.25
    with pytest.raises(ValueError, match=r"^new_tokens: got 44, expected at least 45"):
        measure_latency(None, {}, 0.1, 1, 640, 44)
