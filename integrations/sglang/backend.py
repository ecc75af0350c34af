"""The attention backend: SGLang's own prefill, measured; decoding on the compressed cache."""

from __future__ import annotations

from typing import Any

import torch
import triton
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, KVWriteLoc

from vlcache_triton.ops import get_backend
from vlcache_triton.recipe.profile import check_fits

from .block_table import DecodeStep, Overflow, PackedLayout, fill_block_table
from .fitting import describe_fit
from .graphs import graph_widths, width_of
from .measure import Measurement, ending_prompts, plan_measurement, plan_prompts
from .packing import pack_prompts
from .pool import OneTensorKVPool
from .prompts import PromptTable, TrackedPrompt
from .ranks import Ranks
from .settings import Settings


class VLCacheAttnBackend(TritonAttnBackend):
    """SGLang's Triton backend, with prompts measured at prefill and compressed at its end.

    layers: of each attention layer's id, which of the pool's it is.

    Args:
        runner: SGLang's ModelRunner, checked by check_server.
    """

    def __init__(self, runner: Any, settings: Settings) -> None:
        super().__init__(runner)
        self.settings = settings
        self.ops = get_backend(settings.kernels, torch.device(runner.device))
        pool = self.token_to_kv_pool
        self.layers = {i: i for i in range(runner.model_config.num_hidden_layers)}
        if type(pool) is HybridLinearKVPool:  # the other layers keep a state, and no KV
            self.layers, pool = pool.full_attention_layer_id_mapping, pool.full_kv_pool
        if not isinstance(pool, OneTensorKVPool) or not hasattr(pool, "flat"):
            raise NotImplementedError(
                f"--attention-backend vlcache: got a KV pool of {type(pool).__name__}, expected"
                " SGLang's plain one"
            )
        if len(pool.flat) >= 2**31:
            raise NotImplementedError(
                f"--attention-backend vlcache: got {len(pool.flat)} KV rows, expected fewer"
                " than 2**31; lower --max-total-tokens"
            )
        self.pool, self.num_layers = pool, len(self.layers)
        self.table = PromptTable(settings.config, self.num_layers)
        self.table.graph_widths = graph_widths(self._max_context())
        self.ranks = _ranks(runner.model_config)
        if settings.profile is not None:
            num_kv_heads = runner.model_config.get_total_num_kv_heads()
            check_fits(settings.profile, self.num_layers, num_kv_heads)
        self.measurement: Measurement | None = None
        self.ending: list[TrackedPrompt] = []
        self.step: DecodeStep | None = None
        self.overflow = Overflow(pool.flat.device)
        self.num_biased_heads = 0 if settings.config.remainder == "none" else pool.flat.shape[1]
        num_rows = len(self.req_to_token)
        self.layout = PackedLayout.empty(self.num_layers, num_rows, pool.flat.device)

    # ---- what SGLang calls before a forward

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.measurement, self.ending, self.step = None, [], None
        mode = forward_batch.forward_mode
        if mode.is_decode():
            self.overflow.check()
            width = self._longest(forward_batch)
            self.step = self._empty_step(forward_batch.batch_size, width)
            return
        super().init_forward_metadata(forward_batch)
        if not mode.is_extend():
            return
        self.layout.reset(forward_batch.req_pool_indices)
        if forward_batch.rids is not None:  # None: a warm-up batch
            lengths = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
            spans = list(zip(forward_batch.rids, *lengths, strict=True))
            self.measurement = plan_measurement(self.table, spans, self.req_to_token)
            self.ending = ending_prompts(self.table, spans)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Tables at fixed addresses. Every captured step uses the front of the same ones."""
        self._graph_step = self._empty_step(max_bs, self._max_context())

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """The step's tables are written inside the graph, from SGLang's static batch tensors."""
        from sglang.srt.model_executor.runner_utils.capture_mode import (
            get_capture_attention_variant,
        )

        if not forward_batch.forward_mode.is_decode_or_idle():
            raise NotImplementedError(
                f"--attention-backend vlcache: got a graph of {forward_batch.forward_mode},"
                " expected decode"
            )
        if not in_capture:
            self.overflow.check()
        self.measurement, self.ending = None, []
        width = width_of(get_capture_attention_variant(), self.table)
        self.step = self._graph_step.first(forward_batch.batch_size, width)

    def shared_read_ends(self, fm: Any) -> SharedReadEnds:
        """req_to_token is read in every layer, up to the last."""
        return SharedReadEnds.UNKNOWN

    # ---- forwards

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        _refuse(kwargs)
        out = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        if self.measurement is not None:
            self.measurement.add_layer(
                self.layers[layer.layer_id],
                self.num_layers,
                q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
                self.token_to_kv_pool.get_key_buffer(layer.layer_id)[:, None],
                layer.scaling,
                self.settings.config,
                self.ops,
            )
        if layer.layer_id == max(self.layers) and self.ending:
            prompts, settings = self.ending, self.settings
            plan = plan_prompts(prompts, settings.config, self.ranks, self.ops, settings.profile)
            pack_prompts(prompts, plan, self.pool, self.req_to_token, self.layout, self.ops)
        return out

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        _refuse(kwargs)
        if save_kv_cache:
            location = KVWriteLoc.for_batch(forward_batch)
            self._set_kv_buffer(forward_batch, layer, location, k, v)
        step, pool = self.step, self.pool
        assert step is not None, "a decode without init_forward_metadata"
        fill_block_table(
            self.layers[layer.layer_id],
            self.req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            self.layout,
            pool.num_rows,
            step,
            self.overflow,
        )
        out = self.ops.varlen_decode(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            pool.flat[: -pool.num_rows, None],
            pool.flat[pool.num_rows :, None],
            step.cu_seqlens,
            step.cu_seqlens,
            1,
            step.block_table.shape[1],
            softmax_scale=layer.scaling,
            seqused_k=step.seqused_k,
            block_table=step.block_table,
            first_key_bias=step.first_key_bias,
        )
        return out.view(len(q), -1)

    def describe_fit(self, runner: Any) -> str:
        """A line for the server's log: which flags fit the budget."""
        from sglang.srt.runtime_context import get_exec

        decode = get_exec().graph.cuda_graph_config.decode
        return describe_fit(
            self.settings.config,
            self.num_layers,
            self.token_to_kv_pool.size,
            min(self.max_context_len, self.req_to_token.shape[1]),
            runner.max_running_requests,
            0 if decode.backend == "disabled" else decode.max_bs or 0,
        )

    def _empty_step(self, num_seqs: int, max_blocks: int) -> DecodeStep:
        return DecodeStep.empty(num_seqs, max_blocks, self.num_biased_heads, self.device)

    def _max_context(self) -> int:
        """A request may be as long as this: it needs a slot for each token until it is packed."""
        return min(self.max_context_len, self.req_to_token.shape[1], self.token_to_kv_pool.size)

    def _longest(self, forward_batch: Any) -> int:
        """Host bound of the batch's live lengths."""
        if forward_batch.rids is None or self.table.longest_live is None:  # a warm-up batch
            return self._max_context()
        return triton.cdiv(self.table.longest_live, 16) * 16  # one variant of the kernels


def _ranks(model_config: Any) -> Ranks:
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.attn_tp_size == 1:
        return Ranks()
    return Ranks(
        parallel.attn_tp_size,
        parallel.attn_tp_rank,
        model_config.get_total_num_kv_heads(),
        parallel.attn_tp_group.device_group,
    )


def _refuse(kwargs: dict[str, Any]) -> None:
    """SGLang's attention variants that the kernels do not have."""
    for name, value in kwargs.items():
        if value is not None:
            raise NotImplementedError(f"--attention-backend vlcache: got {name}, expected None")
