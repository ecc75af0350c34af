"""The paper's tasks through lmms-eval: a process for each task, variant and budget."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from vlcache_triton.recipe.config import VLCacheConfig
from vlcache_triton.recipe.policies import POLICIES

from ..evaluation.metrics import Z95
from ..evaluation.variants import FULL, Comparison, Variant
from .scores import Score

#: COCO captions, DocVQA and MathVista, as the paper has them; the metric that it reports of each.
TASKS = {
    "coco2014_cap_val": "coco_CIDEr",
    "docvqa_val": "anls",
    "mathvista_testmini_format": "gpt_eval_score",
}
RESULTS = "*/*_results.json"  # below what lmms-eval is told to write to

#: (task, variant's name, budget, how to run it).
Job = tuple[str, str, float, Callable[[], Path]]


def has_lmms_eval() -> bool:
    """Whether lmms-eval is installed."""
    return find_spec("lmms_eval") is not None


def lmms_jobs(
    model: str,
    tasks: Iterable[str],
    budgets: Sequence[float],
    compare: Comparison,
    limit: int,
    folder: Path,
    options: Sequence[str] = (),
) -> Iterator[Job]:
    """What to run, the full cache first; a job returns the file of its results, which it writes
    where there is none.

    Variants that no arguments of lmms-eval's model can name are left out: policies with parameters
    of their own.

    Args:
        limit: samples of each task.
        options: further arguments of the model, "dtype=bfloat16" or the like.
    """
    whole = Variant(FULL, VLCacheConfig(budget=1.0))
    variants = [whole, *(v for b in sorted(budgets) if b < 1 for v in compare(b, None))]
    for task in tasks:
        for variant in variants:
            if variant is whole or variant.policy in POLICIES:
                budget = float(variant.config.budget)
                file_name = re.sub(r"[^\w.=-]+", "-", variant.name)
                place = folder / task / f"{file_name}-{budget:g}"
                arguments = ",".join([f"pretrained={model}", *_arguments(variant), *options])
                command = [sys.executable, "-m", "lmms_eval", "--model", "vlcache"]
                command += ["--model_args", arguments, "--tasks", task, "--limit", str(limit)]
                command += ["--output_path", str(place)]
                yield task, variant.name, budget, partial(_run, command, place)


def lmms_scores(task: str, variant: str, budget: float, results: Path) -> Score:
    """The task's own metric; the first number there is of a task that is not the paper's."""
    found = json.loads(results.read_text(encoding="utf-8"))["results"][task]
    numbers = {
        name.partition(",")[0]: value
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    metric = TASKS.get(task)
    if metric not in numbers:
        metric = next((name for name in numbers if not name.endswith("_stderr")), None)
    if metric is None:
        raise ValueError(f"{results}: got no number for {task!r} among {sorted(found)}")
    value, error = float(numbers[metric]), numbers.get(f"{metric}_stderr")
    low, high = (None, None) if error is None else (value - Z95 * error, value + Z95 * error)
    return Score(task, variant, budget, metric, value, low, high)


def _arguments(variant: Variant) -> list[str]:
    """What the model of integrations/lmms_eval takes: the policy, and each field that is not as
    the class has it."""
    default, policy = VLCacheConfig(), variant.policy.name
    changed = {f.name: getattr(variant.config, f.name) for f in fields(VLCacheConfig)}
    changed = {k: v for k, v in changed.items() if v != getattr(default, k) or k == "budget"}
    return [f"policy={policy}", *(f"{name}={value}" for name, value in changed.items())]


def _run(command: list[str], place: Path) -> Path:
    found = sorted(place.glob(RESULTS))
    if not found:
        done = subprocess.run(command, capture_output=True, text=True)
        found = sorted(place.glob(RESULTS))
        if done.returncode or not found:
            lines = [x for x in (done.stderr or done.stdout).splitlines() if x.strip()]
            reason = lines[-1] if lines else f"it ended with {done.returncode}"
            raise RuntimeError(f"lmms_eval: {reason}")
    return found[-1]
