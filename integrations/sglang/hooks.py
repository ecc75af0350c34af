"""Where SGLang is hooked into. Every hook does what it did before until vlcache is the backend.

A slot goes back to the scheduler in five steps: the prompt is noted before each chunk (`see`); its
last chunk's last layer packs it (backend.py); once the scheduler has the chunk's result, the slots
behind the kept ones are freed (`free_evicted`); admission is reopened, and SGLang's memory checks
are told of the slots that are left; they are freed when the request leaves (`release`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from . import BACKEND_NAME
from .settings import read_settings
from .state import table
from .support import SGLANG_VERSION


def kv_pool_class(original: Callable, self: Any, *, kind: str) -> type | None:
    """SRTPlatform.get_kv_pool_cls: the pool that packing needs."""
    from sglang.srt.runtime_context import attention_backends

    if kind == "mha" and BACKEND_NAME in attention_backends() and read_settings(os.environ).pack:
        from .pool import OneTensorKVPool

        return OneTensorKVPool
    return original(self, kind=kind)


def init_forward_batch(original: Callable, cls: type, batch: Any, *args, **kwargs) -> Any:
    """ForwardBatch.init_new: the only place where a forward still knows its requests."""
    prompts = table()
    if prompts is not None and batch.forward_mode.is_extend():
        for req in batch.reqs:
            prompts.see(req)
    if prompts is not None and batch.forward_mode.is_decode():
        prompts.longest_live = max(map(prompts.most_live, batch.reqs), default=None)
    return original(cls, batch, *args, **kwargs)


def process_prefill(original: Callable, self: Any, batch: Any, result: Any) -> Any:
    """SchedulerBatchResultProcessor.process_batch_result_prefill: evicted slots are free now."""
    prompts = table()
    if prompts is None:
        return original(self, batch, result)
    # With overlap, a later chunk may be under way while the result of this one is processed.
    done = [req for req in batch.reqs if req.inflight_middle_chunks <= 0 and not req.is_retracted]
    out = original(self, batch, result)
    for req in done:
        if req.kv.holds_kv and not req.finished():
            req_to_token = self.req_to_token_pool.req_to_token
            prompts.free_evicted(req, req_to_token, self.token_to_kv_pool_allocator)
    return out


def release(original: Callable, self: Any, req: Any, *, checkpointed: bool) -> Any:
    """UnifiedRadixCache.on_release: a request finished, was aborted or retracted."""
    if (prompts := table()) is not None:
        prompts.release(req, self.token_to_kv_pool_allocator)
    return original(self, req, checkpointed=checkpointed)


def reopen_admission(self: Any, running_batch: Any, *args, **kwargs) -> None:
    """Scheduler.get_new_batch_prefill: SGLang takes a full batch for full until one leaves."""
    prompts = table()
    if prompts is not None and prompts.has_freed:
        prompts.has_freed = False
        running_batch.batch_is_full = False


def private_tokens(original: Callable, kv: Any, page_size: int) -> int:
    """pool_stats_observer.kv_private_tokens: SGLang's check that no slot is lost."""
    prompts = table()
    return original(kv, page_size) + (0 if prompts is None else prompts.private_tokens(kv))


def flush(result: Any, *args, **kwargs) -> Any:
    """Scheduler.flush_cache: after it no request is left."""
    prompts = table()
    if prompts is not None and result:
        prompts.clear()
    return result


def max_prefix_len(original: Callable, self: Any, input_len: int) -> int:
    """Req._compute_max_prefix_len: the query rows and the kept tokens are not the tree's."""
    prompts, longest = table(), original(self, input_len)
    ours = None if prompts is None else prompts.longest_prefix(self)
    return longest if ours is None else min(longest, ours)


def graph_variants(original: Callable, hf_config: Any) -> Any:
    """create_attention_graph_variants: decode steps are captured in a few widths."""
    prompts = table()
    if prompts is None or len(prompts.graph_widths) < 2:
        return original(hf_config)
    from .graphs import LiveWidths

    return LiveWidths(prompts)


_SRT = "sglang.srt."
_MANAGERS = _SRT + "managers."
_RESULTS = _MANAGERS + "scheduler_components.batch_result_processor.SchedulerBatchResultProcessor."
HOOKS: dict[str, tuple[Callable, str]] = {
    _SRT + "platforms.interface.SRTPlatform.get_kv_pool_cls": (kv_pool_class, "around"),
    _SRT + "model_executor.forward_batch_info.ForwardBatch.init_new": (
        init_forward_batch,
        "around",
    ),
    _RESULTS + "process_batch_result_prefill": (process_prefill, "around"),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.on_release": (release, "around"),
    _MANAGERS + "scheduler.Scheduler.get_new_batch_prefill": (reopen_admission, "before"),
    _MANAGERS + "scheduler.Scheduler.flush_cache": (flush, "after"),
    _MANAGERS + "scheduler_components.pool_stats_observer.kv_private_tokens": (
        private_tokens,
        "around",
    ),
    _MANAGERS + "schedule_batch.Req._compute_max_prefix_len": (max_prefix_len, "around"),
    _SRT + "layers.attention.graph_variants.create_attention_graph_variants": (
        graph_variants,
        "around",
    ),
}


def register_hooks() -> None:
    """Make "vlcache" a choice of --attention-backend; hook in where the version is ours."""
    from importlib.metadata import version

    from sglang.srt.arg_groups.choices import (
        ATTENTION_BACKEND_CHOICES,
        add_attention_backend_choices,
    )
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if BACKEND_NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([BACKEND_NAME])
    register_attention_backend(BACKEND_NAME)(_create_backend)
    if version("sglang") == SGLANG_VERSION:  # the backend refuses to start on any other
        for target, (hook, kind) in HOOKS.items():
            HookRegistry.register(target, hook, HookType(kind))


def check_hooks() -> None:
    """Raise RuntimeError unless every hook is in its place: SGLang only logs those that fail."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [
        target
        for target, (hook, _) in HOOKS.items()
        if target not in HookRegistry._patched
        or all(entry[1] is not hook for entry in HookRegistry._hooks[target])
    ]
    if missing:
        raise RuntimeError(
            f"--attention-backend vlcache: SGLang did not apply the hooks on {missing}; see the"
            " log above for why (SGLANG_PLUGINS, if set, must name vlcache)"
        )


def _create_backend(runner: Any) -> Any:
    from .backend import create_backend

    return create_backend(runner)
