"""One image, many questions: the page is compressed before any question is known.

Answers of the embedded model to synthetic forms. Each prompt ends with its page; the question
comes afterwards, as a later turn would. For comparison, policies that were shown the question.

    python benchmarks/accuracy/question_later.py RESULTS.jsonl --pages 6 --table question_later.md
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlcache_triton import VLCacheConfig
from vlcache_triton.apps.evaluation import (
    SUITES,
    Item,
    Query,
    Recording,
    Variant,
    encode_form,
    form_item,
)
from vlcache_triton.apps.evaluation.decode import compressed_answers, full_answer
from vlcache_triton.apps.evaluation.metrics import exact_match, wilson_interval
from vlcache_triton.apps.evaluation.run import read_results
from vlcache_triton.apps.formreader import load_form_reader
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.recipe.policies import (
    PromptStatistics,
    h2o,
    keydiff,
    mixkv,
    query_agnostic,
    random_tokens,
    snapkv,
)

SPLIT = "question later"  # pages of no other study
TASKS = ("value", "next", "count", "list")
BUDGETS = (0.05, 0.1, 0.2)


def unknown(budget: float) -> list[Variant]:
    """Compressed before the question: all with a row for what is evicted, and one without."""
    config = VLCacheConfig(budget=budget, remainder="mean")
    policies = (query_agnostic(), mixkv(window=1), h2o(), snapkv(), random_tokens())
    variants = [Variant(policy.name, config, policy) for policy in policies]
    weighed = replace(query_agnostic(), score=distinct_and_long)
    without = Variant("query_agnostic without the row", VLCacheConfig(budget=budget), keydiff())
    return [*variants, Variant("query_agnostic by value norms", config, weighed), without]


def distinct_and_long(statistics: PromptStatistics) -> torch.Tensor:
    """(1 - cosine to the mean unit key) * value norm."""
    assert statistics.key_cosine is not None and statistics.value_norm is not None
    return (1 - statistics.key_cosine) * statistics.value_norm


def known(budget: float) -> list[Variant]:
    """Compressed with the question."""
    return [
        Variant("vl_cache, question known", VLCacheConfig(budget=budget)),
        Variant("tuned, question known", VLCacheConfig.tuned(budget=budget)),
        Variant(
            "query_agnostic, question behind the page",
            VLCacheConfig(budget=budget),
            query_agnostic(),
        ),
    ]


def page_first(query: Query, image_token_id: int) -> Query:
    """The same, but its prompt ends with the last visual token."""
    ids = query.inputs["input_ids"]
    end = int((ids[0] == image_token_id).nonzero()[-1]) + 1
    mask = query.inputs["attention_mask"][:, :end]
    inputs = {**query.inputs, "input_ids": ids[:, :end], "attention_mask": mask}
    return Query(inputs, torch.cat([ids[0, end:].cpu(), query.continuation]))


def answered(
    model: Any, processor: Any, item: Item, query: Query, variants: Sequence[Variant]
) -> dict[str, bool] | None:
    """Which variants answer right; None where the full cache does not."""

    def is_right(tokens: list[int]) -> bool:
        text = processor.decode(tokens, skip_special_tokens=True).strip()
        return bool(exact_match(text, item.answers))

    with vl_cache(model, VLCacheConfig(budget=1.0), cuda_graph=False):
        recording = Recording(model, query, item.max_new_tokens)
        tokens, attention = full_answer(recording)
        if not is_right(tokens):
            return None
        replies = compressed_answers(recording, variants, attention)
    return {
        f"{v.config.budget}|{v.name}": is_right(reply.tokens)
        for v, reply in zip(variants, replies, strict=True)
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: the share of answers that survive, by task, of those of the full cache."""
    counts: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for result in results:
        for key, survived in (result["survived"] or {}).items():
            budget, _, name = key.partition("|")
            counts[budget, name, result["suite"]].append(survived)
    names = list(dict.fromkeys(name for _, name, _ in counts))
    rows = [f"| policy | budget | {' | '.join(TASKS)} | all |", "|---|---:|" + "---:|" * 5]
    for name in names:
        for budget in map(str, BUDGETS):
            cells = [counts[budget, name, task] for task in TASKS]
            together = [x for cell in cells for x in cell]
            low, high = wilson_interval(sum(together), len(together))
            shares = [f"{sum(c)} of {len(c)}" for c in cells]
            whole = f"{sum(together) / len(together):.2f} ({low:.2f} to {high:.2f})"
            rows.append(f"| {name} | {float(budget):.0%} | {' | '.join(shares)} | {whole} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="JSON Lines, gone on from")
    parser.add_argument("--pages", type=int, default=6, help="of each task")
    parser.add_argument("--table", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_form_reader()
    results = read_results(arguments.results)
    done = {(result["suite"], result["index"]) for result in results}
    suites = [suite for suite in SUITES if suite.name in TASKS]
    with arguments.results.open("a") as file:
        for index in range(arguments.pages):
            for suite in suites:
                if (suite.name, index) in done:
                    continue
                item = form_item(suite, index, SPLIT)
                query = encode_form(processor, item, model.device)
                later = page_first(query, model.config.image_token_id)
                before, after = (
                    [v for budget in BUDGETS for v in of(budget)] for of in (unknown, known)
                )
                survived = answered(model, processor, item, later, before)
                if survived is not None:
                    known_too = answered(model, processor, item, query, after)
                    survived |= known_too or {}
                results.append({"suite": suite.name, "index": index, "survived": survived})
                file.write(json.dumps(results[-1]) + "\n")
                file.flush()
    page = table(results)
    print(page)
    if arguments.table:
        arguments.table.write_text(page)


if __name__ == "__main__":
    main()
