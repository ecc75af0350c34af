"""Where SGLang is hooked into. Every hook does what it did before until vlcache is the backend.

A slot goes back to the scheduler in five steps: the prompt is noted before each chunk (`see`); its
last chunk's last layer packs it (backend.py); once the scheduler has the chunk's result, the slots
behind the kept ones are freed (`free_evicted`); admission is reopened, and SGLang's memory checks
are told of the slots that are left; they are freed when the request leaves (`release`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .graphs import LiveWidths
from .prompts import PromptTable

BACKEND_NAME = "vlcache"


class Hooks:
    """The hooks of a process, which has one scheduler and one model.

    table: the prompts under compression; None until the process's attention backend is vlcache.
    seats: of each function of SGLang, the hook and its kind, as HookRegistry has it.
    """

    def __init__(self) -> None:
        self.table: PromptTable | None = None
        parts = "managers.scheduler_components"
        processor = f"{parts}.batch_result_processor.SchedulerBatchResultProcessor"
        around: dict[str, Callable] = {
            "platforms.interface.SRTPlatform.get_kv_pool_cls": self.kv_pool_class,
            "model_executor.forward_batch_info.ForwardBatch.init_new": self.init_forward_batch,
            f"{processor}.process_batch_result_prefill": self.process_prefill,
            "mem_cache.unified_radix_cache.UnifiedRadixCache.on_release": self.release,
            f"{parts}.pool_stats_observer.kv_private_tokens": self.private_tokens,
            "managers.schedule_batch.Req._compute_max_prefix_len": self.max_prefix_len,
            "layers.attention.graph_variants.create_attention_graph_variants": self.graph_variants,
        }
        scheduler = "managers.scheduler.Scheduler"
        seats: dict[str, tuple[Callable, str]] = {
            **{target: (hook, "around") for target, hook in around.items()},
            f"{scheduler}.get_new_batch_prefill": (self.reopen_admission, "before"),
            f"{scheduler}.flush_cache": (self.flush, "after"),
        }
        self.seats = {f"sglang.srt.{target}": hook for target, hook in seats.items()}

    def register(self) -> None:
        """Leave the hooks with SGLang, which applies them before it reads its command line."""
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        for target, (hook, kind) in self.seats.items():
            HookRegistry.register(target, hook, HookType(kind))

    def check(self) -> None:
        """Raise RuntimeError unless every hook is in place: SGLang only logs those that fail."""
        from sglang.srt.plugins.hook_registry import HookRegistry

        missing = [
            target
            for target, (hook, _) in self.seats.items()
            if target not in HookRegistry._patched
            or all(entry[1] is not hook for entry in HookRegistry._hooks[target])
        ]
        if missing:
            raise RuntimeError(
                f"--attention-backend vlcache: SGLang did not apply the hooks on {missing}; see the"
                " log above for why (SGLANG_PLUGINS, if set, must name vlcache)"
            )

    # ---- the hooks; `original` is SGLang's function, and what follows are its arguments

    def kv_pool_class(self, original: Callable, platform: Any, *, kind: str) -> type | None:
        """SRTPlatform.get_kv_pool_cls: the pool that packing needs, before there is a backend."""
        from sglang.srt.runtime_context import attention_backends

        if kind == "mha" and BACKEND_NAME in attention_backends():
            from .pool import OneTensorKVPool

            return OneTensorKVPool
        return original(platform, kind=kind)

    def init_forward_batch(
        self, original: Callable, cls: type, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """ForwardBatch.init_new: the only place where a forward still knows its requests."""
        if self.table is not None and batch.forward_mode.is_extend():
            for req in batch.reqs:
                self.table.see(req)
        if self.table is not None and batch.forward_mode.is_decode():
            self.table.longest_live = max(map(self.table.most_live, batch.reqs), default=None)
        return original(cls, batch, *args, **kwargs)

    def process_prefill(self, original: Callable, processor: Any, batch: Any, result: Any) -> Any:
        """SchedulerBatchResultProcessor.process_batch_result_prefill: evicted slots are free."""
        if self.table is None:
            return original(processor, batch, result)
        # With overlap, a later chunk may be under way while the result of this one is processed.
        done = [r for r in batch.reqs if r.inflight_middle_chunks <= 0 and not r.is_retracted]
        out = original(processor, batch, result)
        for req in done:
            if req.kv.holds_kv and not req.finished():
                req_to_token = processor.req_to_token_pool.req_to_token
                self.table.free_evicted(req, req_to_token, processor.token_to_kv_pool_allocator)
        return out

    def release(self, original: Callable, cache: Any, req: Any, *, checkpointed: bool) -> Any:
        """UnifiedRadixCache.on_release: a request finished, was aborted or retracted."""
        if self.table is not None:
            self.table.release(req, cache.token_to_kv_pool_allocator)
        return original(cache, req, checkpointed=checkpointed)

    def reopen_admission(
        self, scheduler: Any, running_batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Scheduler.get_new_batch_prefill: SGLang takes a full batch for full until one leaves."""
        if self.table is not None and self.table.has_freed:
            self.table.has_freed = False
            running_batch.batch_is_full = False

    def private_tokens(self, original: Callable, kv: Any, page_size: int) -> int:
        """pool_stats_observer.kv_private_tokens: SGLang's check that no slot is lost."""
        ours = 0 if self.table is None else self.table.private_tokens(kv)
        return original(kv, page_size) + ours

    def flush(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        """Scheduler.flush_cache: after it no request is left."""
        if self.table is not None and result:
            self.table.clear()
        return result

    def max_prefix_len(self, original: Callable, req: Any, input_len: int) -> int:
        """Req._compute_max_prefix_len: the query rows and the kept tokens are not the tree's."""
        longest = original(req, input_len)
        ours = None if self.table is None else self.table.longest_prefix(req)
        return longest if ours is None else min(longest, ours)

    def graph_variants(self, original: Callable, hf_config: Any) -> Any:
        """create_attention_graph_variants: decode steps are captured in a few widths."""
        if self.table is None or len(self.table.graph_widths) < 2:
            return original(hf_config)
        return LiveWidths(self.table)
