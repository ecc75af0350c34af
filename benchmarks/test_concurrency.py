"""How many 8K-token prompts fit and decode together on one GPU, with the full and a 10 % cache.

Prompts are prefilled one after another; each leaves its ragged cache in a common pool, one behind
the other, and the captured step then decodes all of them at once. Nothing is computed on paper.
"""

from __future__ import annotations

import dataclasses
import gc

import llava
import pytest
import torch
from measure import DEVICE, HAS_GPU, record
from test_end_to_end import between, now, synchronise
from transformers import PreTrainedModel

from vlcache_triton.integrations.transformers import Session, VLCache, vl_cache
from vlcache_triton.pool.packed import PackedCache
from vlcache_triton.pool.ragged import RaggedCache

LENGTH = 8192 if HAS_GPU else 60
NEW_TOKENS = 30 if HAS_GPU else 5
SETTLED = 4 if HAS_GPU else 2  # steps by which the step has been captured
SLACK = 2 << 30  # bytes left for the decode step's own tensors
MINIATURE_PROMPTS = 3


class Pool:
    """Room for the ragged caches of `num_prompts` prompts, prompt by prompt.

    Segments of a layer ascend but do not touch: between prompts lie their other layers.
    """

    def __init__(self, session: Session, num_prompts: int, first: RaggedCache) -> None:
        self.rows = segment_rows(first)
        self.cache: VLCache = session.new_cache(NEW_TOKENS)
        shape = dataclasses.replace(
            first.shape,
            num_seqs=num_prompts,
            capacity=num_prompts * self.rows,
            max_seqlen_k=LENGTH + NEW_TOKENS,
        )
        packed = PackedCache([0] * num_prompts, LENGTH)
        packed.ragged = self.ragged = session.allocator.allocate(shape, first.backend, packed)
        self.cache.contents.state = packed
        self.num_prompts = self.num_segments = 0
        self.ragged.room = NEW_TOKENS

    def add(self, one: RaggedCache) -> None:
        """Copy a prompt's segments behind those that are here."""
        assert segment_rows(one) == self.rows
        start, segments = self.num_prompts * self.rows, one.seqused_k.shape[1]
        place = slice(self.num_segments, self.num_segments + segments)
        for pool, rows in ((self.ragged.k, one.k), (self.ragged.v, one.v)):
            pool[start : start + self.rows].copy_(rows[: self.rows])
        self.ragged.seqused_k[:, place] = one.seqused_k
        self.ragged.cu_seqlens_k[:, place] = one.cu_seqlens_k[:, :-1] + start
        self.ragged.cu_seqlens_k[:, place.stop] = one.cu_seqlens_k[:, -1] + start
        self.num_prompts, self.num_segments = self.num_prompts + 1, place.stop

    def decode(self, model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
        """NEW_TOKENS - 1 captured steps for all prompts at once; `[num_prompts, NEW_TOKENS]`."""
        chosen = [tokens]
        for step in range(NEW_TOKENS - 1):
            if step == SETTLED:
                self.settled = now()
            position = torch.full_like(tokens[:, None], LENGTH + step)
            out = model(
                input_ids=chosen[-1][:, None],
                position_ids=position,
                cache=self.cache,
                use_cache=True,
            )
            chosen.append(out.logits[:, -1].argmax(-1))
        return torch.stack(chosen, 1)


def segment_rows(ragged: RaggedCache) -> int:
    """Rows that all segments take, head room included."""
    return int(ragged.cu_seqlens_k[-1, -1])


def prefill(
    model: PreTrainedModel, session: Session, seed: int
) -> tuple[torch.Tensor, RaggedCache]:
    """One prompt's first token `[1]` and its cache."""
    inputs = llava.prompt(model, 1, LENGTH, seed)
    cache = session.new_cache(NEW_TOKENS)
    out = model(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
    assert cache.ragged is not None
    return out.logits[:, -1].argmax(-1), cache.ragged


def fitting(model: PreTrainedModel, session: Session, memory_gib: float | None) -> int:
    """Prompts whose caches fit beside the weights and the prefill of one more."""
    if not HAS_GPU:
        return MINIATURE_PROMPTS
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, ragged = prefill(model, session, seed=0)
    prefilling = torch.cuda.max_memory_allocated() - before
    row = ragged.k[0].nbytes + ragged.v[0].nbytes
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    total = min(total, int((memory_gib or 1e6) * 2**30))
    available = total - before - prefilling - SLACK
    # Capacities are rounded up to buckets, by an eighth at most.
    return int(available / (segment_rows(ragged) * row) / 1.125)


@torch.no_grad()
@pytest.mark.parametrize("budget", [1.0, 0.1])
def test_concurrency(request, budget):
    model = llava.build(request.config.getoption("--model"))
    memory_gib = request.config.getoption("--memory-gib")
    gc.collect()
    if HAS_GPU:
        torch.cuda.empty_cache()
    with vl_cache(model, budget=budget, cuda_graph=True) as session:
        num_prompts = fitting(model, session, memory_gib)
        start = now()
        first, one = prefill(model, session, seed=0)
        pool, tokens = Pool(session, num_prompts, one), [first]
        pool.add(one)
        for seed in range(1, num_prompts):
            token, one = prefill(model, session, seed)
            tokens.append(token)
            pool.add(one)
        del one
        prefilled = now()
        answers = pool.decode(model, torch.cat(tokens))
        end = now()
        synchronise()
        num_captures = session.graphs.num_captures
        # The last of them alone says the same as in the crowd, up to what bf16 leaves open.
        alone, cache = prefill(model, session, seed=num_prompts - 1)
        single = Pool(session, 1, cache)
        single.add(cache)
        expected = single.decode(model, alone)
    assert answers.shape == (num_prompts, NEW_TOKENS)
    assert num_captures == 1
    assert answers[-1, 0] == expected[0, 0]
    if not HAS_GPU:
        assert torch.equal(answers[-1:], expected)
        return
    record(
        request,
        [between(start, end)],
        peer="concurrency",
        budget=budget,
        length=LENGTH,
        num_prompts=num_prompts,
        memory_gib=memory_gib or torch.cuda.get_device_properties(DEVICE).total_memory / 2**30,
        prefill_s=between(start, prefilled),
        step_ms=1e3 * between(pool.settled, end) / (NEW_TOKENS - 1 - SETTLED),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30,
        equal_tokens=(answers[-1] == expected[0]).float().mean().item(),
    )
