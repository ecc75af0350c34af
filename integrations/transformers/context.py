"""`with vl_cache(model, ...)`: a model compresses its cache inside, and is as it was outside."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlcache_triton import VLCacheConfig
from vlcache_triton.backend import BackendName, get_backend
from vlcache_triton.policies import VL_CACHE, Policy
from vlcache_triton.report import CompressionReport

from .attention import NAME, register
from .cache import MAX_HEAD_ROOM, VLCache
from .generate import check_stopping, lean_loop, static_warpers
from .graph import DecodeGraphs, graphed_forward
from .names import CACHE, rename_cache
from .passes import check_cache, hook_passes, models_of, named_arguments
from .support import (
    check_choices,
    check_generate,
    check_lean,
    check_mode,
    check_model,
    warn_of_version,
)


@dataclass
class _Run:
    """One `generate`: the tokens it was given, the cache it decodes on, whether its mask has been
    read."""

    input_ids: Any
    cache: VLCache | None = None
    has_read_mask: bool = False


class _Own(threading.local):
    """What each thread has of its own: the cache of its latest prompt, and its `generate`."""

    cache: VLCache | None = None
    run: _Run | None = None


class Session:
    """What happens inside one `vl_cache` block.

    config: the choices of compression.
    cache: the VLCache of the latest prompt that this thread has read, of any thread where it has
        read none; None before the first.
    is_open: False once the block has ended; the report stays.
    graphs: the captured decode steps.
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
        self._latest: VLCache | None = None
        self._own = _Own()
        self._has_said_whole = False
        self.graphs = DecodeGraphs(model.device, can_capture=cuda_graph)
        self._packs_whole = cuda_graph
        self._forward = model.forward

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
            graphs=self.graphs if self._packs_whole else None,
        )
        self.cache = cache
        return cache  # not self.cache: another thread may have set that by now

    @property
    def cache(self) -> VLCache | None:
        return self._latest if self._own.cache is None else self._own.cache

    @cache.setter
    def cache(self, cache: VLCache | None) -> None:
        self._latest = self._own.cache = cache

    def report(self) -> CompressionReport | None:
        """What was kept of the latest prompt, as `cache` has it; None where nothing was
        compressed."""
        cache = self.cache
        return None if cache is None else cache.report()

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
        static_warpers(kwargs.get("logits_processor") or [])
        check_stopping(kwargs.get("stopping_criteria") or [])
        loop = lean_loop(self.graphs, self._forward, on_tokens)
        generate: Any = self.model.generate
        return generate(**kwargs, custom_generate=loop)

    @contextmanager
    def generating(self, input_ids: Any) -> Iterator[None]:
        """Round a `generate` of this thread over these tokens; the cache that it decodes on is
        the session's at its end. (Guidance reads prompts of its own in between.)"""
        outer, self._own.run = self._own.run, _Run(input_ids)
        try:
            yield
            self.cache = self._own.run.cache or self.cache
        finally:
            self._own.run = outer

    def decodes_on(self, cache: VLCache) -> None:
        """Note the cache of the `generate` that is running."""
        if self._own.run is not None:
            self._own.run.cache = cache

    def ids_of(self, embeddings: Tensor | None) -> Tensor | None:
        """The tokens that the running `generate` was given beside these embeddings
        `[num_seqs, length, hidden_size]`; None where it was given none."""
        ids = self._own.run.input_ids if self._own.run is not None else None
        if embeddings is None or not isinstance(ids, Tensor) or ids.ndim != 2:
            return None
        num_seqs, length = embeddings.shape[:2]
        if ids.shape[1] != length or num_seqs % len(ids):
            return None
        return ids.repeat_interleave(num_seqs // len(ids), 0)  # as beams are

    def has_read_mask(self, cache: VLCache) -> bool:
        """Whether the `generate` that runs on this cache has had its mask read: from the second
        time it is asked."""
        run = self._own.run
        if run is None or run.cache is not cache:
            return False
        had_read, run.has_read_mask = run.has_read_mask, True
        return had_read

    def say_whole(self, reason: str) -> None:
        """Warn, once, that an image is left whole."""
        if not self._has_said_whole:
            self._has_said_whole = True
            warnings.warn(f"vl_cache: {reason}: these tokens are left whole", stacklevel=3)

    def _check_open(self, name: str) -> None:
        if not self.is_open:
            raise ValueError(
                f"session.{name}: got a call after its vl_cache block, expected one inside"
            )


@contextmanager
def vl_cache(
    model: PreTrainedModel,
    config: VLCacheConfig | None = None,
    *,
    policy: Policy = VL_CACHE,
    backend: BackendName = "auto",
    cuda_graph: bool | None = None,
    streaming: bool = False,
    **choices: Any,
) -> Iterator[Session]:
    """Compress the KV cache of every image-and-text prompt that `model` reads inside the block.

    Both `model.generate(...)` and manual loops over `model(...)` are served; the model leaves the
    block exactly as it came in, also after an exception.

    Args:
        model: a vision-language model of Transformers with causal text.
        config: the choices of compression, or give them as keywords: `budget=0.1`.
        policy: what ranks tokens and shares the budget out (vlcache_triton.policies), to compare
            VL-Cache with its rivals.
        backend: "auto" is the Triton kernels on CUDA and the fp32 reference elsewhere.
        cuda_graph: decode by replaying a captured step; default on CUDA. Where a capture fails,
            decoding goes on eagerly, with a warning that says why.
        streaming: compress during prefill, where memory is short; the same result.

    Raises:
        NotImplementedError: for models on which VL-Cache is not defined.
        ValueError: for choices out of range or of another type, and for a model that is inside a
            block already.
    """
    if config is not None and choices:
        raise ValueError(f"config: got a VLCacheConfig and {sorted(choices)}, expected one of them")
    config = VLCacheConfig(**choices) if config is None else config
    check_choices(config, policy, streaming)
    if not (isinstance(model, PreTrainedModel) and model.can_generate()):
        raise ValueError(f"model: got {type(model).__name__}, expected one that can generate")
    warn_of_version()
    check_model(model)
    get_backend(backend, model.device)
    if backend == "triton" and model.device.type != "cuda" and model.dtype == torch.bfloat16:
        raise NotImplementedError(
            "model: got bfloat16 in Triton's interpreter, which multiplies its bit patterns"
            " (triton#11584), expected float16 or float32"
        )
    text_config = model.config.get_text_config(decoder=True)
    if text_config._attn_implementation == NAME:
        raise ValueError("model: got one inside a vl_cache block already, expected another")
    cuda_graph = model.device.type == "cuda" if cuda_graph is None else cuda_graph
    session = Session(model, config, policy, backend, cuda_graph, streaming)
    register()
    with ExitStack() as undo:
        undo.callback(setattr, session, "is_open", False)
        _override(model, "generate_batch", _refuse_generate_batch, undo)
        for part in models_of(model):  # BLIP-2's generate is one of its language model
            if not part.can_generate():
                continue
            _override(part, "generate", _checked_generate(part, session), undo)
            prepare = _prepare_cache(part._prepare_cache_for_generation, session)
            _override(part, "_prepare_cache_for_generation", prepare, undo)
        if cuda_graph:
            _override(model, "forward", graphed_forward(session.graphs, model.forward), undo)
        hook_passes(model, session, undo)
        # On the internal attribute: the public setter would pass it on to the vision tower.
        previous = text_config._attn_implementation_internal
        undo.callback(setattr, text_config, "_attn_implementation_internal", previous)
        text_config._attn_implementation_internal = NAME
        yield session


def _override(model: PreTrainedModel, name: str, function: Any, undo: ExitStack) -> None:
    """Set an instance attribute until `undo` closes."""
    if name in model.__dict__:
        undo.callback(setattr, model, name, model.__dict__[name])
    else:
        undo.callback(delattr, model, name)
    setattr(model, name, function)


def _checked_generate(model: PreTrainedModel, session: Session) -> Any:
    generate: Any = model.generate

    @functools.wraps(generate)
    def checked(*args: Any, **kwargs: Any) -> Any:
        kwargs = rename_cache(kwargs)
        given = named_arguments(generate, args, kwargs)
        if given.get("inputs") is not None:
            given["input_ids"] = given.pop("inputs")
        check_cache(given.get(CACHE))
        check_generate(model, given)
        with session.generating(given.get("input_ids")):
            return generate(*args, **kwargs)

    return checked


def _refuse_generate_batch(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("generate_batch: continuous batching is not supported by vl_cache")


def _prepare_cache(original: Any, session: Session) -> Any:
    """Give `generate` a VLCache, where the user did not."""

    @functools.wraps(original)
    def prepare(generation_config, model_kwargs, generation_mode, *args, **kwargs):
        check_mode(generation_mode)
        if model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = session.new_cache(
                generation_config.max_new_tokens or MAX_HEAD_ROOM
            )
        session.decodes_on(model_kwargs[CACHE])
        return original(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    return prepare
