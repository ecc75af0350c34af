"""How much the answers of a model lose as one KV head alone keeps little of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import date
from itertools import islice, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.recipe.config import VLCacheConfig
from vlcache_triton.recipe.plan import (
    CompressionPlan,
    plan_from_scores,
    rank_tokens,
    stack_layers,
)
from vlcache_triton.recipe.profile import HeadProfile

from .decode import full_answer
from .recording import Query, Recording
from .run import MAX_COPIES, MAX_COPY_BYTES
from .variants import Variant

LEVELS = (0.01, 0.03, 0.1, 0.3)


def calibrate(
    model: Any,
    queries: Iterable[tuple[Query, int]],
    variant: Variant,
    data: str,
    levels: Sequence[float] = LEVELS,
    advance: Callable[[], None] = lambda: None,
) -> HeadProfile:
    """A profile of the model, from the answers that it gives with the full cache.

    Args:
        queries: and how many new tokens their answers have at most.
        variant: by which tokens are ranked; its budget is of no matter.
        data: what is asked, in words.
        levels: shares of the prompt, ascending, below 1.
        advance: called after each prompt.

    Raises:
        ValueError: where no answer has a token that the compressed cache decodes.
    """
    sums, count, made_for = None, 0, ""
    for query, max_new_tokens in queries:
        found = head_losses(model, query, max_new_tokens, variant, levels)
        if found is not None:
            losses, made_for = found
            sums = losses if sums is None else sums + losses
            count += 1
        advance()
    if sums is None:
        raise ValueError("data: got answers of one token alone, expected some that are decoded")
    return HeadProfile(
        made_for,
        date.today().isoformat(),
        data,
        variant.name,
        count,
        list(levels),
        (sums / count).tolist(),
    )


@torch.no_grad()
def head_losses(
    model: Any, query: Query, max_new_tokens: int, variant: Variant, levels: Sequence[float]
) -> tuple[Tensor, str] | None:
    """(losses, the model as its caches have it): `[num_layers, num_kv_heads, levels]` fp64, the
    mean loss of a token of the full cache's answer as one head keeps a share of the prompt and all
    others keep it whole, less that of the whole prompt. None where nothing is decoded.

    Cost: one step over the answer for each, on a copy of the prompt that is all but whole.
    """
    with vl_cache(model, VLCacheConfig(budget=1.0), cuda_graph=False):
        recording = Recording(model, query, max_new_tokens)
        answer, _ = full_answer(recording)
        device = recording.logits.device
        continuation = query.continuation.to(device)
        ids = torch.cat([continuation, torch.tensor(answer[:-1], device=device)]).long()
        if not len(ids):
            return None
        # The first token of a single turn is the prefill's own, whatever is kept.
        expected = torch.tensor(answer if len(continuation) else answer[1:], device=device)
        plan_of, (num_layers, num_kv_heads, length) = _planner(recording, variant)
        whole = torch.full((num_layers, num_kv_heads), length)
        shares = [whole]
        for layer, head, level in product(range(num_layers), range(num_kv_heads), levels):
            shares.append(whole.clone())
            shares[-1][layer, head] = max(round(level * length), 1)
        at_once = max(min(MAX_COPIES, MAX_COPY_BYTES // max(recording.prompt_bytes, 1)), 1)
        losses, left = [], iter(shares)
        while some := list(islice(left, at_once)):
            copies = recording.compress([plan_of(keep) for keep in some])
            out = model(input_ids=ids.expand(len(some), -1), cache=copies, use_cache=True)
            rows = out.logits[:, -len(expected) :].double()
            wanted = expected.expand(len(some), -1)
            losses.append(F.cross_entropy(rows.transpose(1, 2), wanted, reduction="none").mean(1))
    loss = torch.cat(losses).cpu()
    losses_by_head = (loss[1:] - loss[0]).view(num_layers, num_kv_heads, len(levels))
    return losses_by_head, recording.cache.made_for


def _planner(
    recording: Recording, variant: Variant
) -> tuple[Callable[[Tensor], CompressionPlan], torch.Size]:
    """(tokens of each head `[num_layers, num_kv_heads]` -> the plan of the recorded prompt, ranked
    as the variant does; num_layers, num_kv_heads, length)."""
    backend, config = recording.backend, variant.effective
    prompt, stats = recording.measure(variant)
    scores, _ = rank_tokens(stats, stack_layers(stats), prompt, config, variant.policy)
    unmeasured = torch.full((len(scores), 1), torch.nan, dtype=torch.float64)

    def plan(head_keep: Tensor) -> CompressionPlan:
        return plan_from_scores(scores, unmeasured, prompt, config, backend, head_keep[:, None])

    return plan, scores.shape
