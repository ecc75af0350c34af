"""`session.generate`: a lean loop, with sampling and stopping inside the captured step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
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

from .cache import VLCache
from .graph import DecodeGraphs, Loan, run_model
from .names import CACHE

# Warpers that look at the scores alone, so that a captured step may call them.
STATIC_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
# Steps that the host runs ahead of what it has read back; window rings can take back 16.
LAG = 4


class TokenStep:
    """The body of a lean step: the model, then the next token, all in static buffers.

    input_ids: `[num_seqs, 1]`, the token to read next; position_ids `[..., num_seqs, 1]`, its
        position.
    finished: `[num_seqs]` bool, sequences that have met their end.
    penalised: `[num_seqs, vocab_size]` bool, tokens seen, where a repetition penalty is set.
    """

    def __init__(
        self,
        loan: Loan,
        forward: Callable[..., Any],
        position_ids: Tensor,
        warpers: Sequence[Any],
        penalty: float | None,
        config: Any,
    ) -> None:
        self.loan, self.forward, self.do_sample = loan, forward, config.do_sample
        self.warpers, self.penalty = warpers, penalty
        num_seqs, device = position_ids.shape[-2], position_ids.device
        self.input_ids = torch.zeros(num_seqs, 1, dtype=torch.long, device=device)
        self.position_ids = position_ids.contiguous().clone()
        self.finished = torch.zeros(num_seqs, dtype=torch.bool, device=device)
        self.penalised: Tensor | None = None
        eos = config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        pad = config.pad_token_id if config.pad_token_id is not None else (eos or [0])[0]
        self.eos = torch.tensor(eos, dtype=torch.long, device=device)
        self.pad = torch.tensor(pad, dtype=torch.long, device=device)

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

    def run(self) -> None:
        """Read a token, choose the next, and move on by one position."""
        output = run_model(self.loan, self.forward, self.input_ids, self.position_ids)
        self.position_ids += 1
        self._choose(output.logits[:, -1])

    def _choose(self, logits: Tensor) -> None:
        scores = logits.float()
        if self.penalised is not None:
            penalty: Any = self.penalty
            lowered = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(self.penalised, lowered, scores)
        for warper in self.warpers:
            scores = warper(self.input_ids, scores)
        if self.do_sample:
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


def lean_loop(
    graphs: DecodeGraphs,
    whole: Any,
    forward: Callable[..., Any],
    on_tokens: Callable[[Tensor], None] | None,
) -> Callable[..., Tensor]:
    """A decoding method for `generate(custom_generate=...)`, which does all the preparation.

    whole: the model that `forward` is of.
    """

    def decode(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        if model is not whole:  # as BLIP-2, whose generate is one of its language model
            raise NotImplementedError(
                f"session.generate: got {type(whole).__name__}, which has {type(model).__name__}"
                " generate, expected a model that does so itself (model.generate has the others)"
            )
        config, cache = kwargs.pop("generation_config"), kwargs[CACHE]
        processors = static_warpers(kwargs.pop("logits_processor"))
        check_stopping(kwargs.pop("stopping_criteria"))
        _take_over(cache, graphs)
        penalties = [x for x in processors if type(x) is RepetitionPenaltyLogitsProcessor]
        penalty = penalties[0].penalty if penalties else None
        warpers = [x for x in processors if x not in penalties]
        num_new = config.max_length - input_ids.shape[1]
        output = model._prefill(input_ids, config, kwargs)
        logits = output.logits[:, -1]
        position_ids = _next_position(cache, logits)
        position_ids = position_ids.expand(*position_ids.shape[:-2], len(logits), 1)
        seen = _penalised(penalties[0], input_ids, logits) if penalties else None

        def make(loan: Loan) -> TokenStep:
            return TokenStep(loan, forward, position_ids, warpers, penalty, config)

        key = (
            "token",
            position_ids.shape,
            config.do_sample,
            str(config.eos_token_id),
            config.pad_token_id,
            penalty,
            str([vars(x) for x in warpers]),
        )
        step = graphs.step(cache, key, make)
        assert step is not None and isinstance(step.body, TokenStep)
        step.body.start(position_ids, logits, seen)
        del output, logits
        readback, tokens = Readback(step.body), []
        readback.push()
        num_launched, is_done = 1, False
        while (len(readback) or num_launched < num_new) and not is_done:
            if len(readback) <= LAG and num_launched < num_new:
                cache.begin_step(1)
                step.launch()
                cache.end_step()
                readback.push()
                num_launched += 1
                continue
            chosen, is_done = readback.pop()
            tokens.append(chosen)
            if on_tokens is not None:
                on_tokens(chosen)
        cache.take_back(num_launched - len(tokens))
        new_tokens = torch.stack(tokens, 1).to(input_ids.device)
        return torch.cat([input_ids, new_tokens], 1)

    return decode


def _next_position(cache: VLCache, logits: Tensor) -> Tensor:
    """`[..., num_seqs, 1]`: behind the last that the prompt's pass was given. Where it was given
    none, models count the tokens in the cache, pads included."""
    if cache.position_ids is None:
        return torch.full((1, 1), cache.num_seen, device=logits.device)
    return cache.position_ids + 1


def _take_over(cache: VLCache, graphs: DecodeGraphs) -> None:
    """Have the prompt packed for these graphs, even a whole one."""
    if cache.graphs is not graphs and cache.ragged is None and cache.get_seq_length() > 0:
        raise ValueError(
            f"{CACHE}: got a whole cache that another loop has filled, expected an empty one, a"
            " compressed one, or one that session.generate has filled"
        )
    cache.decode_with(graphs)


def _penalised(
    penalty: RepetitionPenaltyLogitsProcessor, prompt_ids: Tensor, logits: Tensor
) -> Tensor:
    """The tokens that the processor counts as seen, `[num_seqs, vocab_size]` bool: it knows of
    pads and of prompts to ignore."""
    ones = torch.ones_like(logits, dtype=torch.float32)
    return penalty(prompt_ids.to(logits.device), ones) != 1.0


def static_warpers(processors: Sequence[Any]) -> list[Any]:
    """The processors, if a captured step may call them; refused by name else."""
    for processor in processors:
        if not isinstance(processor, (*STATIC_WARPERS, RepetitionPenaltyLogitsProcessor)):
            raise NotImplementedError(
                f"session.generate: got {type(processor).__name__}, expected temperature, top_k,"
                " top_p, min_p or repetition_penalty (model.generate has the others)"
            )
    return list(processors)


def check_stopping(criteria: Sequence[Any]) -> None:
    """Refuse what is neither a length nor an end token, by name."""
    for criterion in criteria:
        if not isinstance(criterion, (EosTokenCriteria, MaxLengthCriteria)):
            raise NotImplementedError(
                f"session.generate: got {type(criterion).__name__}, expected max_new_tokens and"
                " eos_token_id alone (model.generate has the others)"
            )
