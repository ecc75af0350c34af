"""Prefill, and the time of a token behind it, by batch and length: the stock loop, ours whole, ours
compressed."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.recipe.config import VLCacheConfig

WARM_TOKENS = 3  # by which steps have been captured
SETTLED, DRAINED = 10, 5  # tokens left out: the loop reads back late, and the last ones together
MIN_NEW_TOKENS = 3 * (SETTLED + DRAINED)


class Ticks(BaseStreamer):
    """Notes when each step's tokens reach the host, as a streamer or as `on_tokens`."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, tokens: Tensor) -> None:
        self.at.append(time.perf_counter())

    def put(self, value: Tensor) -> None:
        """Tokens; the prompt, which comes first, is no step."""
        if value.ndim == 1:
            self(value)

    def end(self) -> None:
        """Nothing is left to do."""

    def seconds_a_token(self) -> float:
        """From token to token, once the loop has settled."""
        at = self.at[SETTLED:-DRAINED]
        return (at[-1] - at[0]) / (len(at) - 1)


def measure_latency(
    model: Any, inputs: dict[str, Any], budget: float, batch: int, length: int, new_tokens: int
) -> list[dict[str, Any]]:
    """A row each for Transformers' own loop, our loop on the full cache, and on the compressed one.

    A row: loop, budget, batch, length (as it came to be), new_tokens, prefill_s (compression
    included), token_ms (from one token to the next, in ms), total_s, kv_bytes of the prompt
    as compressed (else None), peak_bytes on a GPU beyond what was there before (else None).

    Args:
        inputs: of one prompt with an image, as `generate` takes them; text is put before it until
            it is `length` tokens long, and it is repeated `batch` times. A prompt that is longer
            by itself stays as it is.
        new_tokens: at least MIN_NEW_TOKENS.

    Raises:
        ValueError: for fewer, whose times would be those of reading back.
    """
    if new_tokens < MIN_NEW_TOKENS:
        raise ValueError(f"new_tokens: got {new_tokens}, expected at least {MIN_NEW_TOKENS}")
    inputs = _repeated(_stretched(inputs, length), batch)
    rows = []
    for loop, share in (("transformers", 1.0), ("ours", 1.0), ("ours", budget)):
        run = functools.partial(_decode, model, inputs, None if loop == "transformers" else share)
        run(WARM_TOKENS)
        gc.collect()
        _settle(model.device)
        before = _allocated(model.device)
        prefill, _ = _timed(model.device, functools.partial(run, 1))
        total, (kv_bytes, token) = _timed(model.device, functools.partial(run, new_tokens))
        rows.append(
            {
                "loop": loop,
                "budget": share,
                "batch": batch,
                "length": int(inputs["input_ids"].shape[1]),
                "new_tokens": new_tokens,
                "prefill_s": prefill,
                "token_ms": 1e3 * token,
                "total_s": total,
                "kv_bytes": kv_bytes,
                "peak_bytes": _peak(model.device, before),
            }
        )
    return rows


def _decode(
    model: Any, inputs: dict[str, Any], budget: float | None, num_tokens: int
) -> tuple[int | None, float]:
    """(bytes that compression keeps, seconds a token); without a budget by the stock loop."""
    ticks, report = Ticks(), None
    greedy = {"do_sample": False, "eos_token_id": None, "max_new_tokens": num_tokens}
    if budget is None:
        model.generate(**inputs, **greedy, streamer=ticks)
    else:
        with vl_cache(model, VLCacheConfig(budget=budget)) as session:
            session.generate(**inputs, **greedy, on_tokens=ticks)
        report = session.report()
    kept = None if report is None else report.bytes_after
    return kept, ticks.seconds_a_token() if num_tokens >= MIN_NEW_TOKENS else 0.0


def _stretched(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    """More text behind the first token, before any image: of all that has a value a token, more."""
    ids = inputs["input_ids"]
    missing = max(length - ids.shape[1], 0)
    text = ids[:, -1:]  # no image ends a prompt that has a question
    fillers = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    longer = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == ids.shape:
            filler = fillers.get(name, torch.zeros_like(value[:, :1]))
            value = torch.cat([value[:, :1], filler.expand(-1, missing), value[:, 1:]], 1)
        longer[name] = value
    return longer


def _repeated(inputs: dict[str, Any], batch: int) -> dict[str, Any]:
    return {k: torch.cat([v] * batch) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _timed(device: torch.device, run: Callable[[], Any]) -> tuple[float, Any]:
    _settle(device)
    started = time.perf_counter()
    result = run()
    _settle(device)
    return time.perf_counter() - started, result


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, before: int) -> int | None:
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
