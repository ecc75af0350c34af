"""Prefill, compression, decoding and memory of a 7B model: ours, Transformers' loops, kvpress.

One pass each: prefill ends where the first forward pass does (compression included). The time of a
token is that between tokens once the loop has settled, after capture or compilation; the time of
all tokens includes those.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import llava
import pytest
import torch
from measure import DEVICE, HAS_GPU, copy_rate, record
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vlcache_triton.apps.reproduce.latency import Ticks
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.contents import Contents
from vlcache_triton.integrations.transformers.names import CACHE

NEW_TOKENS = 100 if HAS_GPU else 12
SETTLED = 10 if HAS_GPU else 3  # tokens by which steps have been captured
DRAINED = 5  # tokens that the lean loop, which reads back late, may hand over at once at its end
CHECKED_TOKENS = 20 if HAS_GPU else 6
WARM_LENGTH = 2048
SHAPES = [
    (1, 2048),
    (1, 8192),
    (1, 32768),
    (1, 131072),
    (4, 8192),
    (4, 32768),
    (16, 2048),
    (16, 8192),
    (64, 2048),
]
COMPILED_SHAPES = [(1, 2048), (16, 8192)]  # each is compiled anew, for the better part of a minute
CHECKED_SHAPES = [(1, 2048), (4, 8192), (16, 2048)]
if not HAS_GPU:
    SHAPES = COMPILED_SHAPES = CHECKED_SHAPES = [(2, 48)]


class Stopwatch:
    """When the first forward pass ended, how long compression took in it, all on the device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.compressing = model, []
        self.start = self.prefilled = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch one generate."""
        hook = self.model.register_forward_hook(self._forward_done)
        compress = Contents.add_layer

        def timed(contents: Contents, *args: Any) -> None:
            before = now()
            compress(contents, *args)
            self.compressing.append((before, now()))

        try:
            with mock.patch.object(Contents, "add_layer", timed):
                self.start = now()
                yield
                self.end = now()
                synchronise()
        finally:
            hook.remove()

    def _forward_done(self, *args: Any) -> None:
        if self.prefilled is None:
            self.prefilled = now()

    def seconds(self, ticks: Ticks) -> dict[str, float]:
        """prefill, compression within it, one token, and all."""
        steady = ticks.at[SETTLED:-DRAINED]
        return {
            "prefill": between(self.start, self.prefilled),
            "compression": sum(between(a, b) for a, b in self.compressing),
            "token": (steady[-1] - steady[0]) / (len(steady) - 1),
            "total": between(self.start, self.end),
        }


def now() -> Any:
    """A point in the device's time; on the CPU, in the host's."""
    if not HAS_GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds from one point to another."""
    return start.elapsed_time(end) / 1e3 if HAS_GPU else end - start


def synchronise() -> None:
    """Wait for the device."""
    if HAS_GPU:
        torch.cuda.synchronize()


def greedy(num_tokens: int) -> dict[str, Any]:
    """The same number of tokens for all."""
    return {"do_sample": False, "max_new_tokens": num_tokens, "eos_token_id": None}


# Runners return the tokens and what holds the cache.
def ours(
    budget: float, lean: bool, model: PreTrainedModel, inputs: dict, num_tokens: int, ticks: Ticks
) -> tuple[Tensor, Any]:
    """Captured steps."""
    with vl_cache(model, budget=budget) as session:
        if lean:
            tokens = session.generate(**inputs, **greedy(num_tokens), on_tokens=ticks)
        else:
            tokens = model.generate(**inputs, **greedy(num_tokens), streamer=ticks)
        return tokens, session.cache  # which the session lets go of


def transformers_loop(
    more: dict, model: PreTrainedModel, inputs: dict, num_tokens: int, ticks: Ticks
) -> tuple[Tensor, Any]:
    """`model.generate` as it comes, or with its static cache, whose step it compiles on CUDA."""
    out = model.generate(
        **inputs, **greedy(num_tokens), **more, streamer=ticks, return_dict_in_generate=True
    )
    return out.sequences, out


def kvpress(
    model: PreTrainedModel, inputs: dict, num_tokens: int, ticks: Ticks
) -> tuple[Tensor, Any]:
    """SnapKV at a tenth, by kvpress' hooks on the language model."""
    from kvpress import SnapKVPress

    cache = DynamicCache()
    with SnapKVPress(compression_ratio=0.9)(model.get_decoder()):
        tokens = model.generate(**inputs, **greedy(num_tokens), streamer=ticks, **{CACHE: cache})
    return tokens, cache


RUNNERS: dict[str, tuple[Callable, float]] = {
    "lean-0.1": (functools.partial(ours, 0.1, True), 0.1),
    "lean-1.0": (functools.partial(ours, 1.0, True), 1.0),
    "default": (functools.partial(transformers_loop, {}), 1.0),
    "stock-0.1": (functools.partial(ours, 0.1, False), 0.1),
    "stock-1.0": (functools.partial(ours, 1.0, False), 1.0),
    "static": (functools.partial(transformers_loop, {"cache_implementation": "static"}), 1.0),
    "kvpress": (kvpress, 0.1),
}


@pytest.fixture
def model(request) -> PreTrainedModel:
    return llava.build(request.config.getoption("--model"))


def memory() -> tuple[int, int]:
    """Bytes allocated, and the most there ever were."""
    return (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if HAS_GPU else (0, 0)


def free() -> None:
    """Give back what earlier runs left."""
    gc.collect()
    if HAS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@pytest.mark.parametrize(("num_seqs", "length"), SHAPES)
@pytest.mark.parametrize("name", RUNNERS)
def test_end_to_end(request, model, name, num_seqs, length):
    if name == "kvpress" and importlib.util.find_spec("kvpress") is None:
        pytest.skip("kvpress is not installed")
    if name == "static" and (num_seqs, length) not in COMPILED_SHAPES:
        pytest.skip("compiling for every shape takes minutes")
    run, budget = RUNNERS[name]
    inputs = llava.prompt(model, num_seqs, length)
    if name == "static":  # compiles for this very shape
        run(model, inputs, NEW_TOKENS, Ticks())
    else:
        run(model, llava.prompt(model, num_seqs, min(length, WARM_LENGTH)), SETTLED, Ticks())
    free()
    before, _ = memory()
    stopwatch, ticks = Stopwatch(model), Ticks()
    with stopwatch.watch():
        tokens, cache = run(model, inputs, NEW_TOKENS, ticks)
    assert len(ticks.at) == NEW_TOKENS
    seconds = stopwatch.seconds(ticks)
    resident, peak = memory()
    assert tokens.shape == (num_seqs, length + NEW_TOKENS)
    if name.startswith(("lean", "stock")) and budget < 1:
        assert cache.is_compressed
        kept = cache.report().bytes_after
        assert kept <= num_seqs * (budget * length + 1) * llava.kv_bytes_of_a_token(model)
    if not HAS_GPU:
        return
    read = num_seqs * llava.kv_bytes_of_a_token(model) * (budget * length + NEW_TOKENS / 2)
    roofline = (llava.weight_bytes(model) + read) / copy_rate()
    record(
        request,
        [seconds["total"]],
        peer=name,
        num_seqs=num_seqs,
        length=length,
        budget=budget,
        new_tokens=NEW_TOKENS,
        prefill_ms=1e3 * seconds["prefill"],
        compression_ms=1e3 * seconds["compression"],
        overhead_percent=100
        * seconds["compression"]
        / (seconds["prefill"] - seconds["compression"]),
        token_ms=1e3 * seconds["token"],
        roofline_ms=1e3 * roofline,
        times_roofline=seconds["token"] / roofline,
        total_s=seconds["total"],
        resident_mib=(resident - before) / 2**20,
        peak_mib=(peak - before) / 2**20,
        copy_rate=copy_rate() / 1e9,
    )


@pytest.mark.parametrize("budget", [0.1, 1.0])
@pytest.mark.parametrize(("num_seqs", "length"), CHECKED_SHAPES)
def test_captured_steps_choose_the_eager_path_s_tokens(model, num_seqs, length, budget):
    inputs = llava.prompt(model, num_seqs, length)
    with vl_cache(model, budget=budget, cuda_graph=True) as session:
        lean = session.generate(**inputs, **greedy(CHECKED_TOKENS))
        stock = model.generate(**inputs, **greedy(CHECKED_TOKENS))
        captures = session.graphs.num_captures
    with vl_cache(model, budget=budget, cuda_graph=True) as session:
        session.graphs.can_capture = False
        eager = model.generate(**inputs, **greedy(CHECKED_TOKENS))
        assert session.graphs.num_captures == 0
    assert captures == 2
    assert torch.equal(lean, eager)
    assert torch.equal(stock, eager)
    assert lean.device.type == DEVICE.type
