"""A session: what happens inside one `vl_cache` block, told apart by threads."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedModel

from vlcache_triton import VLCacheConfig
from vlcache_triton.ops import BackendName
from vlcache_triton.pool.allocator import PoolAllocator
from vlcache_triton.recipe.policies import Policy
from vlcache_triton.recipe.report import CompressionReport

from .cache import MAX_HEAD_ROOM, VLCache
from .generate import LeanLoop, check_static
from .graph import DecodeGraphs
from .rope_state import RopeState
from .support import check_lean, describe_model


@dataclass
class _Run:
    """One `generate`: the tokens it was given, the cache it decodes on, whether its mask has been
    read."""

    input_ids: Any
    cache: VLCache | None = None
    has_read_mask: bool = False


class _Running(threading.local):
    """The `generate` that each thread is in, and the model whose forward pass has been announced:
    the models within it, which it runs, announce nothing."""

    run: _Run | None = None
    model: PreTrainedModel | None = None


class _Held:
    """The cache of a thread's latest prompt, held until the block ends; its report, for good."""

    def __init__(self, cache: VLCache | None = None) -> None:
        self._cache = cache
        self._weakly: Callable[[], VLCache | None] = lambda: None
        self._report: CompressionReport | None = None

    @property
    def cache(self) -> VLCache | None:
        """The cache; after the block, None where nobody else holds it."""
        return self._weakly() if self._cache is None else self._cache

    def report(self) -> CompressionReport | None:
        """That of the cache, wherever it is."""
        return self._report if self._cache is None else self._cache.report()

    def let_go(self) -> None:
        """Give the memory back, unless somebody else holds the cache."""
        if self._cache is not None:
            self._report, self._weakly = self._cache.report(), weakref.ref(self._cache)
            self._cache = None


class Session:
    """What happens inside one `vl_cache` block.

    config: the choices of compression.
    cache: the VLCache of the latest prompt that this thread has read, of any thread where it has
        read none; None before the first. Held until the block ends.
    is_open: False once the block has ended; the report stays.
    graphs: the captured decode steps.
    allocator: lends the memory that they read.
    made_for: the model, as its caches have it.
    rope_state: what the model notes on itself between the passes of a prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: VLCacheConfig,
        policy: Policy,
        backend: BackendName,
        cuda_graph: bool,
        streaming: bool,
    ) -> None:
        self.model, self.config, self.policy, self.backend = model, config, policy, backend
        self.streaming = streaming
        self.is_open = True  # until the block ends
        self._latest = _Held()
        self._held: WeakKeyDictionary[threading.Thread, _Held] = WeakKeyDictionary()
        self.running = _Running()
        self._has_said_whole = False
        self.graphs = DecodeGraphs(model.device, can_capture=cuda_graph)
        self.allocator = PoolAllocator()
        self._packs_whole = cuda_graph
        self._forward = model.forward
        self.made_for, self.rope_state = describe_model(model.config), RopeState(model)

    def new_cache(self, max_new_tokens: int = MAX_HEAD_ROOM) -> VLCache:
        """An empty cache for manual loops and dialogues, to hand over as `cache`, or by the name
        that older Transformers have for it, `past_key_values`: either does, whichever is installed.

        Raises:
            ValueError: after the block, where the model would not compress it.
        """
        self._check_open("new_cache")
        cache = VLCache(
            self.model.config,
            self.config,
            policy=self.policy,
            max_new_tokens=max_new_tokens,
            backend=self.backend,
            streaming=self.streaming,
            allocator=self.allocator if self._packs_whole else None,
        )
        self.cache = cache
        return cache  # not self.cache: another thread may have set that by now

    @property
    def cache(self) -> VLCache | None:
        return self._own_or_latest.cache

    @cache.setter
    def cache(self, cache: VLCache | None) -> None:
        self._latest = self._held[threading.current_thread()] = _Held(cache)

    def report(self) -> CompressionReport | None:
        """What was kept of the latest prompt, as `cache` has it; None where nothing was
        compressed.

        Raises:
            RuntimeError: where decode steps have lost rows, as `RaggedCache.check_room` has it.
        """
        _check_room(self._own_or_latest.cache)
        return self._own_or_latest.report()

    @property
    def _own_or_latest(self) -> _Held:
        return self._held.get(threading.current_thread(), self._latest)

    def generate(
        self, *, on_tokens: Callable[[Tensor], None] | None = None, **kwargs: Any
    ) -> Tensor:
        """`model.generate(**kwargs)` with a lean loop: the same tokens, less work a token.

        Sampling runs inside the captured step, and the host reads tokens back a few steps behind.
        Greedy and sampled decoding with temperature, top_k, top_p, min_p, repetition_penalty,
        max_new_tokens and eos_token_id; `model.generate` has the rest.

        Args:
            on_tokens: called with each step's tokens, `[num_seqs]` int64 on the host, in order.

        Returns:
            `[num_seqs, prompt + new]` int64, as `model.generate` returns it.

        Raises:
            NotImplementedError: for what the lean loop does not do, before any work.
            ValueError: after the block, which the loop decodes in.
        """
        self._check_open("generate")
        check_lean(self.model, kwargs)
        given = (kwargs.get(name) or [] for name in ("logits_processor", "stopping_criteria"))
        check_static(*given)
        loop = LeanLoop(self.model, self._forward, self.graphs, self.allocator, on_tokens)
        generate: Any = self.model.generate
        return generate(**kwargs, custom_generate=loop)

    @contextmanager
    def generating(self, input_ids: Any, cache: VLCache | None) -> Iterator[None]:
        """Round a `generate` of this thread over these tokens, on this cache if one was given; the
        cache that it decodes on is the session's at its end. (Guidance reads prompts of its own in
        between.)"""
        if cache is not None:
            self.rope_state.recall(cache.rope_deltas)
        outer, self.running.run = self.running.run, _Run(input_ids)
        try:
            yield
            self.cache = self.running.run.cache or self.cache
            _check_room(self.cache)
        finally:
            self.running.run = outer

    def resume(self, cache: VLCache) -> None:
        """Before each pass: go on where the cache's latest has ended, whichever came between."""
        if self.running.run is None:  # else once, before `generate` looks at new images
            self.rope_state.recall(cache.rope_deltas)
        if self._packs_whole and cache.packed is not None:
            cache.pack_into(self.allocator)

    def decodes_on(self, cache: VLCache) -> None:
        """Note the cache of the `generate` that is running."""
        if self.running.run is not None:
            self.running.run.cache = cache

    def ids_of(self, embeddings: Tensor | None) -> Tensor | None:
        """The tokens that the running `generate` was given beside these embeddings
        `[num_seqs, length, hidden_size]`; None where it was given none."""
        ids = self.running.run.input_ids if self.running.run is not None else None
        if embeddings is None or not isinstance(ids, Tensor) or ids.ndim != 2:
            return None
        num_seqs, length = embeddings.shape[:2]
        if ids.shape[1] != length or num_seqs % len(ids):
            return None
        return ids.repeat_interleave(num_seqs // len(ids), 0)  # as beams are

    def has_read_mask(self, cache: VLCache) -> bool:
        """Whether the `generate` that runs on this cache has had its mask read: from the second
        time it is asked."""
        run = self.running.run
        if run is None or run.cache is not cache:
            return False
        had_read, run.has_read_mask = run.has_read_mask, True
        return had_read

    def say_whole(self, reason: str) -> None:
        """Warn, once, that an image is left whole."""
        if not self._has_said_whole:
            self._has_said_whole = True
            warnings.warn(f"vl_cache: {reason}: these tokens are left whole", stacklevel=3)

    def check_room(self) -> None:
        """At the block's end: no thread's cache has lost a row."""
        for held in [self._latest, *self._held.values()]:
            _check_room(held.cache)

    def close(self) -> None:
        """Let caches, captured steps and memory go, as the block ends; reports stay."""
        self.is_open = False
        for held in [self._latest, *self._held.values()]:
            held.let_go()
        self.graphs.clear()
        self.allocator.clear()

    def _check_open(self, name: str) -> None:
        if not self.is_open:
            raise ValueError(
                f"session.{name}: got a call after its vl_cache block, expected one inside"
            )


def _check_room(cache: VLCache | None) -> None:
    """Where the host waits for the device anyway: at the end of an answer, of a block."""
    if cache is not None and cache.ragged is not None:
        cache.ragged.check_room()
