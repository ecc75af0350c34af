"""What `vlcache reproduce` measures: each part from the options, with progress, once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlcache_triton.apps.evaluation import Comparison, Item, run
from vlcache_triton.apps.reproduce import (
    Parts,
    Score,
    ablated,
    curves,
    lmms_jobs,
    lmms_scores,
    measure_latency,
    measure_sparsity,
    scores_of,
)

from .console import one_line, progress
from .questions import Question, evaluations, questions_of
from .vlm import VisionLanguageModel, refusals

CHOICES_BUDGET = 0.1  # of the ablation and of latency, where it is among the budgets


@dataclass
class Plan:
    """The options, and what they make: loaded when first asked for.

    shapes: (batch, length) of latency. failed: what could not be measured, and why.
    """

    model: str | None
    items: list[Item]
    suites: Sequence[str]
    tasks: Sequence[str]
    budgets: list[float]
    limit: int
    shapes: list[tuple[int, int]]
    new_tokens: int
    device: str | None
    dtype: str
    out: Path
    failed: list[str] = field(default_factory=list)

    def settings(self, data: Path | None) -> dict[str, Any]:
        """What a folder's results are of."""
        names = ("suites", "tasks", "budgets", "limit", "shapes", "new_tokens", "dtype")
        chosen = {name: getattr(self, name) for name in names}
        return {"model": self.model, "data": data and str(data), **chosen}

    @property
    def through_lmms(self) -> bool:
        """Whether accuracy is lmms-eval's to say."""
        return self.model is not None and not self.items

    @property
    def done(self) -> Parts:
        """The folder of finished parts."""
        return Parts(self.out)

    @property
    def choices_budget(self) -> float:
        """The one budget of what is not measured at all of them."""
        return CHOICES_BUDGET if CHOICES_BUDGET in self.budgets else self.budgets[0]

    @functools.cached_property
    def vlm(self) -> VisionLanguageModel:
        """In this process; lmms-eval's processes, which come first, load their own."""
        return VisionLanguageModel(self.model, device=self.device, dtype=self.dtype)

    @functools.cached_property
    def questions(self) -> list[Question]:
        """The user's, or synthetic forms, which any model can be shown."""
        return questions_of(self.vlm, self.items[: self.limit], self.suites, self.limit)


def accuracy(plan: Plan) -> list[Score]:
    """Of every policy, at every budget."""
    return _scores(plan, "accuracy", plan.budgets, curves)


def ablation(plan: Plan) -> list[Score]:
    """Of the recipe with its choices changed one at a time."""
    return _scores(plan, "ablation", [plan.choices_budget], ablated)


def _scores(plan: Plan, name: str, budgets: list[float], compare: Comparison) -> list[Score]:
    if plan.through_lmms:
        return _through_lmms(plan, name, budgets, compare)
    rows = plan.done.get(name, lambda: _of_items(plan, name, budgets, compare))
    return [Score(**row) for row in rows]


def _of_items(
    plan: Plan, name: str, budgets: list[float], compare: Comparison
) -> list[dict[str, Any]]:
    """By our own evaluation: one prefill an item."""
    jobs = evaluations(plan.vlm, plan.questions, budgets, compare)
    with progress(name, len(jobs)) as advance, refusals():
        results = run(jobs, plan.out / f"{name}.jsonl", advance)
    return [score._asdict() for score in scores_of(results)]


def _through_lmms(plan: Plan, name: str, budgets: list[float], compare: Comparison) -> list[Score]:
    """By lmms-eval, whose files are the parts; what fails is noted, and tried again the next time.
    A task that the full cache fails on is left out."""
    assert plan.model is not None
    options = [] if plan.dtype == "auto" else [f"dtype={plan.dtype}"]
    options += [] if plan.device is None else [f"device={plan.device}"]
    folder = plan.out / "lmms-eval"
    jobs = list(lmms_jobs(plan.model, plan.tasks, budgets, compare, plan.limit, folder, options))
    scores = []
    lost: set[str] = set()
    with progress(name, len(jobs)) as advance:
        for task, variant, budget, run in jobs:
            if task not in lost:
                try:
                    scores.append(lmms_scores(task, variant, budget, run()))
                except (RuntimeError, ValueError) as error:
                    what = f"{task}, {variant} at {budget:g}"
                    plan.failed.append(f"{what}: {one_line(str(error))}")
                    if budget == 1.0:
                        lost.add(task)
            advance()
    return scores


def sparsity(plan: Plan) -> dict[str, list[list[float]]]:
    """By layer, of all prompts."""
    return plan.done.get("sparsity", lambda: _sparsity(plan))


def _sparsity(plan: Plan) -> dict[str, list[list[float]]]:
    with progress("sparsity", len(plan.questions)) as advance, refusals():

        def prompts() -> Iterator[Any]:
            for question in plan.questions:
                item, query = question.load()
                yield query, item.max_new_tokens
                advance()

        return measure_sparsity(plan.vlm.model, prompts())


def latency(plan: Plan) -> list[dict[str, Any]]:
    """A part for each shape, for each takes a while; a shape that does not fit is noted."""
    rows = []
    with progress("latency", len(plan.shapes)) as advance:
        for batch, length in plan.shapes:
            measure = functools.partial(_latency, plan, batch, length)
            try:
                rows += plan.done.get(f"latency/{batch}x{length}", measure)
            except (ValueError, NotImplementedError, torch.OutOfMemoryError) as error:
                plan.failed.append(f"latency, {batch} x {length}: {one_line(str(error))}")
            advance()
    return rows


def _latency(plan: Plan, batch: int, length: int) -> list[dict[str, Any]]:
    _, query = plan.questions[0].load()
    budget, new_tokens = plan.choices_budget, plan.new_tokens
    return measure_latency(plan.vlm.model, query.inputs, budget, batch, length, new_tokens)


PARTS: dict[str, Callable[[Plan], Any]] = {
    "accuracy": accuracy,
    "ablation": ablation,
    "sparsity": sparsity,
    "latency": latency,
}
