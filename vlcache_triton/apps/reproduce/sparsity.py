"""Sparsity by layer, of many prompts: on the post-vision rows, and on the rows of the answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.recipe.config import VLCacheConfig

from ..evaluation import Query, Recording, Variant
from ..evaluation.decode import full_answer


def measure_sparsity(
    model: Any, prompts: Iterable[tuple[Query, int]]
) -> dict[str, list[list[float]]]:
    """γ' (eq. 2) of each prompt and layer, the mean over query heads: "prefill", over the
    post-vision rows, `[num_prompts][num_layers]`; "decoding", over the rows of the answer's tokens
    and all that they see; of prompts whose answer has such rows.

    Args:
        prompts: each with the longest answer, in tokens.

    Raises:
        ValueError: where a prompt has no image.
    """
    found: dict[str, list[list[float]]] = {"prefill": [], "decoding": []}
    paper = Variant("", VLCacheConfig())
    for query, max_new_tokens in prompts:
        with vl_cache(model, VLCacheConfig(budget=1.0), cuda_graph=False):
            recording = Recording(model, query, max_new_tokens)
            found["prefill"].append([_sparsity(x.post_vision) for x in recording.measure(paper)[1]])
            tokens, _ = full_answer(recording)
            if len(tokens) > 1:
                rows = recording.answer_stats(len(tokens) - 1)
                found["decoding"].append([_sparsity(stats) for stats in rows])
    return found


def _sparsity(stats: Any) -> float:
    """Of one sequence."""
    return 1.0 - float(stats.retained.double().mean() / stats.visible.double().sum())
