"""`vlcache reproduce`, whole, on the embedded model; and through lmms-eval, which is played."""

import json
import sys

import pytest

from vlcache_triton.apps import reproduce
from vlcache_triton.apps.cli.reproduce import PART_NAMES, TASK_NAMES
from vlcache_triton.apps.cli.reproduce_parts import PARTS
from vlcache_triton.apps.formreader.model import WEIGHTS
from vlcache_triton.recipe.policies import POLICIES

SMALL = ("--limit", 1, "--suite", "value", "--budget", 0.1, "--length", 640, "--batch", 1)
SMALL += ("--batch", 2, "--new-tokens", 45)

# Writes what lmms-eval writes, a worse score the less is kept; one task always fails.
LMMS_EVAL = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for name in ("model", "model_args", "tasks", "limit", "output_path"):
    parser.add_argument("--" + name, required=True)
given = parser.parse_args()
assert given.model == "vlcache" and given.limit == "2"
if given.tasks == "docvqa_val":
    raise SystemExit("no such data")
arguments = dict(pair.split("=") for pair in given.model_args.split(","))
score = {"coco_CIDEr,none": float(arguments["budget"]), "coco_CIDEr_stderr,none": 0.1}
folder = pathlib.Path(given.output_path, "model")
folder.mkdir(parents=True)
results = {"results": {given.tasks: {"alias": given.tasks, **score}}, "args": given.model_args}
(folder / "20261126_results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def played(tmp_path, monkeypatch):
    """An lmms-eval on the path, of this process and of those it starts."""
    package = tmp_path / "path" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(LMMS_EVAL)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


def test_the_command_knows_the_parts_and_the_tasks():
    assert tuple(PARTS) == PART_NAMES
    assert tuple(reproduce.TASKS) == TASK_NAMES


def test_all_parts_of_the_embedded_model_and_again(vlcache, tmp_path, monkeypatch):
    out = tmp_path / "out"
    outcome = vlcache("reproduce", *SMALL, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["about"]["model"] == "form-reader" and found["failed"] == []
    scores = {(x["task"], x["variant"], x["budget"]) for x in found["accuracy"]}
    policies = {p.name for p in POLICIES} - {"full"}
    assert {("value", name, 0.1) for name in policies | {"tuned"}} | {("value", "full", 1.0)} <= (
        scores
    )
    changed = {x["variant"] for x in found["ablation"]}
    for field, values in reproduce.ABLATED.items():
        assert {f"{field}={value}" for value in values} <= changed
    sparsity = found["sparsity"]
    assert [len(sparsity[phase][0]) for phase in ("prefill", "decoding")] == [8, 8]
    assert all(0 < x < 1 for phase in sparsity.values() for prompt in phase for x in prompt)
    rows = [(r["batch"], r["length"], r["loop"], r["budget"]) for r in found["latency"]]
    loops = (("transformers", 1.0), ("ours", 1.0), ("ours", 0.1))
    assert rows == [(batch, 640, *loop) for batch in (1, 2) for loop in loops]
    for row in found["latency"]:
        # Neither nothing, as where tokens are read back all at once, nor more than there was.
        assert 0.02 < 44 * row["token_ms"] / 1e3 / row["total_s"] < 2
    compressed = [r["kv_bytes"] for r in found["latency"] if r["budget"] == 0.1]
    assert compressed[0] == pytest.approx(0.1 * 640 * 8 * 2 * 2 * 64 * 4, rel=0.01)
    assert compressed[1] == 2 * compressed[0]
    page = (out / "report.md").read_text()
    for title in ("Accuracy by budget", "The recipe's choices", "Sparsity by layer", "Latency"):
        assert f"## {title}" in page
    assert len(list(out.glob("*.png"))) == 4 and "Not measured" not in page

    # Nothing is measured twice: without a model, and without anything that could measure.
    monkeypatch.setattr("vlcache_triton.apps.cli.reproduce_parts.VisionLanguageModel", None)
    again = vlcache("reproduce", *SMALL, "--out", out, "--json")
    assert json.loads(again.out) == found
    other = vlcache("reproduce", *SMALL, "--new-tokens", 46, "--out", out)
    assert other.code == 2 and "holds results of" in other.err


def test_one_part_alone(vlcache, tmp_path):
    outcome = vlcache("reproduce", *SMALL, "--part", "sparsity", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "out" / "report.md").read_text()
    assert "## Sparsity by layer" in page and page.count("\n## ") == 1


def test_the_papers_tasks_through_lmms_eval(vlcache, tmp_path, played):
    """What fails is said, and tried again; a task whose full cache fails is left out."""
    asked = ("--model", WEIGHTS, "--part", "accuracy", "--limit", 2, "--budget", 0.1)
    tasks = ("--task", "coco2014_cap_val", "--task", "docvqa_val")
    outcome = vlcache("reproduce", *asked, *tasks, "--out", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["failed"] == ["docvqa_val, full at 1: lmms_eval: no such data"]
    by_name = {x["variant"]: x for x in found["accuracy"]}
    assert {x["task"] for x in found["accuracy"]} == {"coco2014_cap_val"}
    assert {"full", "vl_cache", "tuned", "snapkv", "vl_cache, one set a layer"} <= set(by_name)
    assert "snapkv, tuned" not in by_name  # its window has no argument there
    _, _, budget, metric, value, low, high = by_name["tuned"].values()
    assert (budget, metric, value) == (0.1, "coco_CIDEr", 0.1)
    assert low == pytest.approx(0.1 - 0.196, abs=1e-3) and high == pytest.approx(0.1 + 0.196, 1e-3)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "## Not measured" in page and "docvqa_val, full" in page
    (run,) = (tmp_path / "out" / "lmms-eval" / "coco2014_cap_val").glob("tuned-0.1/*/*.json")
    given = json.loads(run.read_text())["args"].split(",")
    assert {f"pretrained={WEIGHTS}", "policy=vl_cache", "budget=0.1", "remainder=mean"} <= {*given}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--part", "speed"), "part: got 'speed'"),
        (("--suite", "speed"), "suite: got 'speed'"),
        (("--budget", 1), "budget: got [1.0]"),
        (("--new-tokens", 44), "--new-tokens"),
        (("--data", "nofile"), "data: cannot read 'nofile'"),
        (("--model", "some/model"), "model: got no lmms-eval"),
        (("--device", "abacus"), "device: got 'abacus'"),
    ],
)
def test_what_the_user_can_put_right(vlcache, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    outcome = vlcache("reproduce", *arguments, "--out", tmp_path / "out")
    assert outcome.code == 2 and message in outcome.err
    assert len(outcome.err.splitlines()) == 1
