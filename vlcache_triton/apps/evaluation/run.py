"""The run: every item once, all variants and budgets from one prefill, one JSON line an item."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.recipe.config import VLCacheConfig

from .decode import Reply, compressed_answers, full_answer
from .items import Item
from .metrics import anls, exact_match, token_agreement
from .recording import Query, Recording
from .variants import BUDGETS, FULL, Comparison, Variant, compare_all

# Compressed copies of a prompt that are decoded on at once.
MAX_COPIES = 12
MAX_COPY_BYTES = 2 * 1024**3


def evaluate_item(
    model: Any,
    processor: Any,
    item: Item,
    query: Query,
    budgets: Sequence[float] = BUDGETS,
    compare: Comparison = compare_all,
) -> dict[str, Any]:
    """One item, from one prefill: what the full cache answers, and each variant at each budget.

    A budget of 1.0 is the full cache itself. The result is ready for JSON.

    Raises:
        ValueError: where the prompt has no image, so that there is nothing to compress.
    """

    def row(name: str, budget: float, reply: Reply, expected: list[int]) -> dict[str, Any]:
        text = processor.decode(reply.tokens, skip_special_tokens=True).strip()
        return {
            "variant": name,
            "budget": budget,
            "text": text,
            "exact": exact_match(text, item.answers),
            "anls": anls(text, item.answers),
            "agreement": token_agreement(reply.tokens, expected),
            "hit_rate": reply.hit_rate,
            "kv_bytes": reply.kv_bytes,
        }

    with vl_cache(model, VLCacheConfig(budget=1.0), cuda_graph=False):
        recording = Recording(model, query, item.max_new_tokens)
        if not recording.prompt.is_compressible:
            raise ValueError(f"item {item.index} of {item.suite}: got no image, expected one")
        tokens, attention = full_answer(recording)
        rows = [row(FULL, 1.0, Reply(tokens, 1.0, recording.prompt_bytes), tokens)]
        variants = [v for b in sorted(budgets) if b < 1.0 for v in compare(b, attention)]
        for batch in _batches(variants, recording.prompt_bytes):
            replies = compressed_answers(recording, batch, attention)
            for variant, reply in zip(batch, replies, strict=True):
                rows.append(row(variant.name, variant.config.budget, reply, tokens))
    return {
        "suite": item.suite,
        "index": item.index,
        "answers": list(item.answers),
        "prompt_tokens": int(query.inputs["input_ids"].shape[1]),
        "rows": rows,
    }


def run(
    items: Iterable[tuple[str, int, Callable[[], dict[str, Any]]]],
    results: Path,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Evaluate what is not in the file `results` yet, adding a line for each item as it is done.

    Returns all results of the file, those of earlier runs included.

    Args:
        items: (suite, index, how to evaluate it).
        results: JSON Lines; a run that was cut off goes on from it, a torn last line is redone.
        advance: called after each item, done or found done.
    """
    done = {(r["suite"], r["index"]): r for r in read_results(results)}
    with results.open("a", encoding="utf-8") as file:
        for suite, index, evaluate in items:
            if (suite, index) not in done:
                done[suite, index] = evaluate()
                file.write(json.dumps(done[suite, index]) + "\n")
                file.flush()
            advance()
    return list(done.values())


def read_results(path: Path) -> list[dict[str, Any]]:
    """The finished items of a results file; none where it does not exist. A last line that was cut
    off while it was written is taken out of the file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _batches(variants: Sequence[Variant], prompt_bytes: int) -> Iterator[list[Variant]]:
    """Variants in their order, as many at once as is quick and fits."""
    batch: list[Variant] = []
    for variant in variants:
        num_bytes = sum(v.config.budget for v in (*batch, variant)) * prompt_bytes
        if batch and (len(batch) == MAX_COPIES or num_bytes > MAX_COPY_BYTES):
            yield batch
            batch = []
        batch.append(variant)
    if batch:
        yield batch
