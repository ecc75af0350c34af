"""Greedy decoding of one prompt: on its full cache, and on compressed copies of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlcache_triton.integrations.transformers import VLCache
from vlcache_triton.recipe.plan import CompressionPlan

from .recording import Recording
from .variants import Variant


@dataclass(frozen=True)
class Reply:
    """One greedy answer. tokens: with the end token, where it came; hit_rate: the share of the
    attention that the full cache's answer paid to the prompt, which fell on kept tokens; None for
    an answer without decoded rows. kv_bytes: K and V of the prompt as kept."""

    tokens: list[int]
    hit_rate: float | None
    kv_bytes: int


@torch.no_grad()
def answer(recording: Recording, cache: VLCache) -> list[list[int]]:
    """Greedy tokens of each sequence of `cache`, after the continuation; each ends with its end
    token or is `max_new_tokens` long. The first token of a single turn is the prefill's own."""
    model, logits, continuation = recording.model, recording.logits, recording.query.continuation
    num_seqs = len(cache.prompt.pads) if cache.prompt is not None else 1
    device, eos = logits.device, end_tokens(model)
    if len(continuation):
        ids = continuation.to(device).expand(num_seqs, -1)
        out = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1]
    token = logits.argmax(-1).expand(num_seqs)
    tokens = [token]
    ends = torch.tensor(sorted(eos), device=device)
    finished = torch.isin(token, ends)
    while len(tokens) < recording.max_new_tokens and not finished.all():
        out = model(input_ids=token[:, None], cache=cache, use_cache=True)
        token = out.logits[:, -1].argmax(-1)
        tokens.append(token)
        finished |= torch.isin(token, ends)
    return [_until(row, eos) for row in torch.stack(tokens, 1).tolist()]


@torch.no_grad()
def full_answer(recording: Recording) -> tuple[list[int], Tensor | None]:
    """The full cache's tokens, and the attention its decoding paid to the prompt.

    The attention is `[num_layers, num_kv_heads, length]` fp32, over the rows of the answer's own
    tokens; None where the answer was one token, which no row had to be decoded for.
    """
    (tokens,) = answer(recording, recording.cache)
    if len(tokens) == 1:
        return tokens, None
    stats, length = recording.answer_stats(len(tokens) - 1), recording.prompt.padded_length
    return tokens, torch.stack([x.scores[:, :length] for x in stats])


def compressed_answers(
    recording: Recording, variants: Sequence[Variant], attention: Tensor | None
) -> list[Reply]:
    """What each variant answers from its compressed copy of the recorded prompt, in one batch;
    attention: the full answer's, for hit rates."""
    plans = [recording.plan_for(variant) for variant in variants]
    tokens = answer(recording, recording.compress(plans))
    row_bytes = recording.prompt_bytes // recording.num_rows
    return [
        Reply(row, hit_rate(plan, attention), int(plan.head_keep.sum()) * row_bytes)
        for row, plan in zip(tokens, plans, strict=True)
    ]


def hit_rate(plan: CompressionPlan, attention: Tensor | None) -> float | None:
    """The share of `attention` `[num_layers, num_kv_heads, length]` that fell on what a plan of
    one prompt keeps."""
    if attention is None:
        return None
    hit = torch.zeros((), dtype=torch.float64)
    for layer, rows in enumerate(attention):
        kept = plan.kept_positions(layer, 0).long()
        hit += rows.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, 0.0).sum().double().cpu()
    return float(hit / attention.double().sum().cpu())


def end_tokens(model: Any) -> set[int]:
    """The tokens that end an answer of this model."""
    eos = model.generation_config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and with the first end token."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]
