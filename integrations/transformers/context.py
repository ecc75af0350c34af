"""`with vl_cache(model, ...)`: a model compresses its cache inside, and is as it was outside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlcache_triton import VLCacheConfig
from vlcache_triton.backend import BackendName, get_backend
from vlcache_triton.policies import VL_CACHE, Policy
from vlcache_triton.prompt import Prompt, read_prompt
from vlcache_triton.report import CompressionReport

from .attention import NAME, prefilling, register
from .cache import MAX_HEAD_ROOM, VLCache
from .generate import check_stopping, lean_loop, static_warpers
from .graph import DecodeGraphs, graphed_forward
from .names import CACHE, rename_cache
from .support import (
    check_choices,
    check_generate,
    check_lean,
    check_mode,
    check_model,
    unobserved,
    warn_of_version,
)


class Session:
    """What happens inside one `vl_cache` block.

    config: the choices of compression.
    cache: the VLCache of the latest prompt, None before the first.
    generating: that of the `generate` that is running.
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
        self.cache: VLCache | None = None
        self.generating: VLCache | None = None
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
        self.cache = VLCache(
            self.model.config,
            self.config,
            policy=self.policy,
            max_new_tokens=max_new_tokens,
            backend=self.backend,
            streaming=self.streaming,
            graphs=self.graphs if self._packs_whole else None,
        )
        return self.cache

    def report(self) -> CompressionReport | None:
        """What was kept of the latest prompt; None where nothing was compressed."""
        return None if self.cache is None else self.cache.report()

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
        _override(model, "generate", _checked_generate(model, session), undo)
        _override(model, "generate_batch", _refuse_generate_batch, undo)
        prepare = _prepare_cache(model._prepare_cache_for_generation, session)
        _override(model, "_prepare_cache_for_generation", prepare, undo)
        if cuda_graph:
            _override(model, "forward", graphed_forward(session.graphs, model.forward), undo)
        before = model.register_forward_pre_hook(_begin(session), with_kwargs=True)
        undo.callback(before.remove)
        after = model.register_forward_hook(_end, with_kwargs=True)
        undo.callback(after.remove)
        # On the internal attribute: the public setter would pass it on to the vision tower.
        previous = text_config._attn_implementation_internal
        undo.callback(prefilling.set, None)
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
    def checked(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        kwargs = rename_cache(kwargs)
        given = {"input_ids": inputs, **kwargs} if inputs is not None else kwargs
        if args:
            given = {"generation_config": args[0], **given}
        _check_cache(given.get(CACHE))
        check_generate(model, given)
        try:
            output = generate(inputs, *args, **kwargs)
            # Guidance reads prompts of its own in between.
            session.cache = session.generating or session.cache
            return output
        finally:
            session.generating = None

    return checked


def _check_cache(cache: Any) -> None:
    if cache is not None and not isinstance(cache, VLCache):
        raise ValueError(
            f"{CACHE}: got {type(cache).__name__}, expected a VLCache"
            " (session.new_cache()) or None inside a vl_cache block"
        )


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
        session.generating = model_kwargs[CACHE]
        return original(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    return prepare


def _begin(session: Session) -> Any:
    """A forward pre-hook: tell the cache about the prompt, or the step, that comes."""

    def begin(model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        prefilling.set(None)
        kwargs = rename_cache(kwargs)
        cache = kwargs.get(CACHE)
        if cache is None:
            if kwargs.get("use_cache") is False or model.training:
                return None
            cache = session.new_cache()
            kwargs = {**kwargs, CACHE: cache, "use_cache": True}
        _check_cache(cache)
        session.cache = cache
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if cache.ragged is not None:
            tokens = kwargs["inputs_embeds"] if input_ids is None else input_ids
            cache.begin_step(tokens.shape[1])
        elif cache.get_seq_length() == 0:
            cache.begin(_read_prompt(model, input_ids, kwargs, cache))
            # A lossless prompt takes the stock path, bit for bit.
            prefilling.set(cache.prompt if cache.will_pack else None)
        return args, kwargs

    return begin


def _read_prompt(
    model: PreTrainedModel, input_ids: Tensor | None, kwargs: dict, cache: VLCache
) -> Prompt:
    if input_ids is None:
        raise NotImplementedError(
            "inputs_embeds: got embeddings alone, expected input_ids, which show where images lie"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise NotImplementedError("attention_mask: expected [num_seqs, length] or None")
    is_visual = visual_tokens(model, input_ids, kwargs.get("mm_token_type_ids"))
    return read_prompt(is_visual, mask, cache.config, cache.policy)


def _end(model: PreTrainedModel, args: tuple, kwargs: dict, output: Any) -> None:
    """A forward hook: count the step's tokens, and see that the prompt was compressed."""
    cache = kwargs.get(CACHE)
    if not isinstance(cache, VLCache):
        return
    prefilling.set(None)
    cache.end_step()
    if cache.will_compress and not cache.is_compressed:
        raise unobserved(model)


def visual_tokens(
    model: PreTrainedModel, input_ids: Tensor, mm_token_type_ids: Tensor | None = None
) -> Tensor:
    """`[num_seqs, length]` bool: image and video tokens, by their ids or by the processor's types.

    `token_type_ids` is never used: models give it other meanings.
    """
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    ids = {getattr(model.config, name, None) for name in names} - {None}
    is_visual = torch.isin(input_ids, torch.tensor(sorted(ids), device=input_ids.device))
    if mm_token_type_ids is not None and mm_token_type_ids.shape == input_ids.shape:
        is_visual = is_visual | (mm_token_type_ids.to(input_ids.device) > 0)
    return is_visual
