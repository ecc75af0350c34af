"""`session.generate`: a lean loop, with sampling and stopping inside the captured step."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from vlcache_triton.pool.allocator import PoolAllocator

from .cache import VLCache
from .graph import DecodeGraphs, Step
from .names import CACHE, decode_forward, prefill_logits

# Warpers that look at the scores alone, so that a captured step may call them.
STATIC_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
# Steps that the host runs ahead of what it has read back; window rings can take back 16.
LAG = 4


class Sampling:
    """How the next token is chosen, and which of them end a sequence.

    key: equal where a captured step does the same.
    """

    def __init__(self, config: Any, processors: Sequence[Any]) -> None:
        penalties = [x for x in processors if type(x) is RepetitionPenaltyLogitsProcessor]
        self.processor = penalties[0] if penalties else None
        self.penalty = None if self.processor is None else self.processor.penalty
        self.warpers = [x for x in processors if x not in penalties]
        self.do_sample = config.do_sample
        eos = config.eos_token_id
        self.eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.pad = config.pad_token_id if config.pad_token_id is not None else (self.eos or [0])[0]
        warpers = str([vars(x) for x in self.warpers])
        self.key = self.do_sample, tuple(self.eos), self.pad, self.penalty, warpers

    def penalised(self, prompt_ids: Tensor, logits: Tensor) -> Tensor | None:
        """The tokens that a repetition penalty counts as seen, `[num_seqs, vocab_size]` bool: it
        knows of pads and of prompts to ignore. None without one."""
        if self.processor is None:
            return None
        ones = torch.ones_like(logits, dtype=torch.float32)
        return self.processor(prompt_ids.to(logits.device), ones) != 1.0


class TokenStep:
    """The body of a lean step: the model, then the next token, all in static buffers.

    input_ids: `[num_seqs, 1]`, the token to read next; position_ids `[..., num_seqs, 1]`, its
        position.
    finished: `[num_seqs]` bool, sequences that have met their end.
    penalised: `[num_seqs, vocab_size]` bool, tokens seen, where a repetition penalty is set.
    """

    def __init__(
        self, forward: Callable[..., Any], sampling: Sampling, position_ids: Tensor
    ) -> None:
        self.forward, self.sampling = forward, sampling
        num_seqs, device = position_ids.shape[-2], position_ids.device
        self.input_ids = torch.zeros(num_seqs, 1, dtype=torch.long, device=device)
        self.position_ids = position_ids.contiguous().clone()
        self.finished = torch.zeros(num_seqs, dtype=torch.bool, device=device)
        self.penalised: Tensor | None = None
        self.eos = torch.tensor(sampling.eos, dtype=torch.long, device=device)
        self.pad = torch.tensor(sampling.pad, dtype=torch.long, device=device)

    def start(self, position_ids: Tensor, logits: Tensor, seen: Tensor | None) -> None:
        """Take the first token from the prompt's logits; position_ids are that token's, `seen` the
        prompt's tokens as `penalised` has them."""
        self.position_ids.copy_(position_ids)
        self.finished.zero_()
        if seen is not None:
            if self.penalised is None:
                self.penalised = seen
            else:
                self.penalised.copy_(seen)
        self._choose(logits)

    def run(self, cache: VLCache) -> None:
        """Read a token, choose the next, and move on by one position."""
        output = decode_forward(self.forward, cache, self.input_ids, self.position_ids)
        self.position_ids += 1
        self._choose(output.logits[:, -1])

    def _choose(self, logits: Tensor) -> None:
        scores = logits.float()
        if self.penalised is not None:
            penalty: Any = self.sampling.penalty
            lowered = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(self.penalised, lowered, scores)
        for warper in self.sampling.warpers:
            scores = warper(self.input_ids, scores)
        if self.sampling.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        tokens = torch.where(self.finished, self.pad, tokens)
        self.input_ids.copy_(tokens[:, None])
        self.finished.logical_or_(torch.isin(tokens, self.eos))
        if self.penalised is not None:
            self.penalised.scatter_(1, self.input_ids, True)


class Readback:
    """Tokens on their way to the host: copied behind each step, looked at a few steps later."""

    def __init__(self, step: TokenStep) -> None:
        self.step = step
        self._pending: deque[tuple[Tensor, Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def push(self) -> None:
        """Start copying what the step has just chosen."""
        on_gpu = self.step.input_ids.device.type == "cuda"
        tokens, finished = self.step.input_ids[:, 0], self.step.finished
        host = [torch.empty_like(x, device="cpu", pin_memory=on_gpu) for x in (tokens, finished)]
        host[0].copy_(tokens, non_blocking=True)
        host[1].copy_(finished, non_blocking=True)
        event = torch.cuda.Event() if on_gpu else None
        if event is not None:
            event.record()
        self._pending.append((host[0], host[1], event))

    def pop(self) -> tuple[Tensor, bool]:
        """The oldest tokens `[num_seqs]`, and whether all sequences were finished by then."""
        tokens, finished, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return tokens, bool(finished.all())


@dataclass(frozen=True)
class LeanLoop:
    """A decoding method for `generate(custom_generate=...)`, which does all the preparation.

    forward: of `model`, without hooks.
    on_tokens: called with each step's tokens, `[num_seqs]` int64 on the host, in order.
    """

    model: Any
    forward: Callable[..., Any]
    graphs: DecodeGraphs
    allocator: PoolAllocator
    on_tokens: Callable[[Tensor], None] | None

    def __call__(self, model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """The prompt's pass, then one step after another; `[num_seqs, prompt + new]`."""
        if model is not self.model:  # as BLIP-2, whose generate is one of its language model
            raise NotImplementedError(
                f"session.generate: got {type(self.model).__name__}, which has"
                f" {type(model).__name__} generate, expected a model that does so itself"
                " (model.generate has the others)"
            )
        config, cache = kwargs.pop("generation_config"), kwargs[CACHE]
        processors = kwargs.pop("logits_processor")
        check_static(processors, kwargs.pop("stopping_criteria"))
        sampling = Sampling(config, processors)
        self._take_over(cache)
        logits = prefill_logits(model, input_ids, config, kwargs)
        step = self._first_step(cache, sampling, input_ids, logits)
        del logits
        new_tokens = self._run_ahead(step, cache, config.max_length - input_ids.shape[1])
        return torch.cat([input_ids, new_tokens.to(input_ids.device)], 1)

    def _take_over(self, cache: VLCache) -> None:
        """Have the prompt packed for captured steps, even a whole one."""
        is_ours = cache.contents.allocator is self.allocator
        if not is_ours and cache.packed is None and cache.get_seq_length() > 0:
            raise ValueError(
                f"{CACHE}: got a whole cache that another loop has filled, expected an empty one,"
                " a compressed one, or one that session.generate has filled"
            )
        cache.pack_into(self.allocator)

    def _first_step(
        self, cache: VLCache, sampling: Sampling, prompt_ids: Tensor, logits: Tensor
    ) -> Step[TokenStep]:
        """The step that decodes on this cache, the first token chosen by the prompt's logits."""
        assert cache.packed is not None
        position_ids = _next_position(cache, logits)
        position_ids = position_ids.expand(*position_ids.shape[:-2], len(logits), 1)
        step = self.graphs.step(
            cache.packed.ragged,
            ("token", position_ids.shape, sampling.key),
            lambda: TokenStep(self.forward, sampling, position_ids),
        )
        step.body.start(position_ids, logits, sampling.penalised(prompt_ids, logits))
        return step

    def _run_ahead(self, step: Step[TokenStep], cache: VLCache, num_new: int) -> Tensor:
        """Launch steps up to LAG ahead of what is read back, where they can be taken back, until
        all sequences have met their end: `[num_seqs, num_new at most]`, of which the step has
        chosen the first."""
        packed, readback = cache.packed, Readback(step.body)
        assert packed is not None
        readback.push()
        tokens: list[Tensor] = []
        num_launched, is_done = 1, False
        lag = LAG if packed.can_take_back else 0
        while (len(readback) or num_launched < num_new) and not is_done:
            if len(readback) <= lag and num_launched < num_new:
                packed.begin_step(1)
                step.launch(packed.places, functools.partial(step.body.run, cache))
                packed.end_step()
                readback.push()
                num_launched += 1
                continue
            chosen, is_done = readback.pop()
            tokens.append(chosen)
            if self.on_tokens is not None:
                self.on_tokens(chosen)
        packed.take_back(num_launched - len(tokens))
        return torch.stack(tokens, 1)


def _next_position(cache: VLCache, logits: Tensor) -> Tensor:
    """`[..., num_seqs, 1]`: behind the last that the prompt's pass was given. Where it was given
    none, models count the tokens in the cache, pads included."""
    if cache.position_ids is None:
        return torch.full((1, 1), cache.get_seq_length(), device=logits.device)
    return cache.position_ids + 1


def check_static(processors: Sequence[Any], criteria: Sequence[Any]) -> None:
    """Refuse, by name, what a captured step may not call, and ends but lengths and end tokens."""
    warpers = (*STATIC_WARPERS, RepetitionPenaltyLogitsProcessor)
    ends = (EosTokenCriteria, MaxLengthCriteria)
    for given, known, expected in (
        (processors, warpers, "temperature, top_k, top_p, min_p or repetition_penalty"),
        (criteria, ends, "max_new_tokens and eos_token_id alone"),
    ):
        for x in given:
            if not isinstance(x, known):
                raise NotImplementedError(
                    f"session.generate: got {type(x).__name__}, expected {expected}"
                    " (model.generate has the others)"
                )
