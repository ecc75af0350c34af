"""The attention backend: SGLang's own prefill, measured; decoding on the compressed cache."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from vlcache_triton.backend import get_backend

from .block_table import PackedLayout, fill_block_table
from .index_only import KeptPositions, sparse_table
from .measure import Measurement, ending_prompts, plan_measurement, plan_prompt
from .packing import pack_prompt
from .pool import OneTensorKVPool
from .prompts import PromptTable, TrackedPrompt
from .settings import Settings, read_settings
from .state import set_table
from .support import check_server, check_version

logger = logging.getLogger(__name__)


def create_backend(runner: Any) -> VLCacheAttnBackend:
    """What SGLang calls for `--attention-backend vlcache`, once the model is loaded.

    Raises:
        ValueError, NotImplementedError, RuntimeError: with a sentence, where it cannot serve.
    """
    from .hooks import check_hooks

    check_version()
    settings = read_settings(os.environ)
    check_hooks()
    check_server(runner)
    backend = VLCacheAttnBackend(runner, settings)
    logger.info(settings.describe())
    return backend


@dataclass(frozen=True)
class DecodeStep:
    """The arguments of `varlen_decode` that layers share, and the table each layer rewrites."""

    block_table: Tensor
    seqused_k: Tensor
    cu_seqlens: Tensor  # of q, a row a request; of k it is not used

    @classmethod
    def empty(cls, num_seqs: int, max_blocks: int, device: torch.device) -> DecodeStep:
        """Room for num_seqs requests of max_blocks tokens."""
        return cls(
            torch.zeros(num_seqs, max_blocks, dtype=torch.int32, device=device),
            torch.zeros(num_seqs, dtype=torch.int32, device=device),
            torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
        )

    def first(self, num_seqs: int) -> DecodeStep:
        """The part of a smaller batch, of the same width."""
        return DecodeStep(
            self.block_table[:num_seqs], self.seqused_k[:num_seqs], self.cu_seqlens[: num_seqs + 1]
        )


class VLCacheAttnBackend(TritonAttnBackend):
    """SGLang's Triton backend, with prompts measured at prefill and compressed at its end.

    Args:
        runner: SGLang's ModelRunner, checked by check_server.
    """

    def __init__(self, runner: Any, settings: Settings) -> None:
        super().__init__(runner)
        self.settings = settings
        self.num_layers = runner.model_config.num_hidden_layers
        self.ops = get_backend(settings.kernels, torch.device(runner.device))
        self.table = PromptTable(settings.config, self.num_layers, settings.pack)
        self.kept: dict[str, KeptPositions] = {}  # VLCACHE_PACK=0
        self.measurement: Measurement | None = None
        self.ending: list[TrackedPrompt] = []
        self.step: DecodeStep | None = None
        pool, num_rows = self.token_to_kv_pool, len(self.req_to_token)
        if settings.pack:
            if not isinstance(pool, OneTensorKVPool) or not hasattr(pool, "flat"):
                raise NotImplementedError(
                    f"--attention-backend vlcache: got a KV pool of {type(pool).__name__}, expected"
                    " SGLang's plain one; VLCACHE_PACK=0 decodes sparsely on any other"
                )
            if len(pool.flat) >= 2**31:
                raise NotImplementedError(
                    f"--attention-backend vlcache: got {len(pool.flat)} KV rows, expected fewer"
                    " than 2**31; lower --max-total-tokens"
                )
            device = pool.flat.device
            self.layout = PackedLayout.empty(self.num_layers, num_rows, device)
        else:
            self.needs_cpu_seq_lens = True
        set_table(self.table)

    # ---- what SGLang calls before a forward

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.measurement, self.ending, self.step = None, [], None
        mode = forward_batch.forward_mode
        if mode.is_decode():
            if self.settings.pack:
                width = self._longest(forward_batch)
                self.step = DecodeStep.empty(forward_batch.batch_size, width, self.device)
            return
        super().init_forward_metadata(forward_batch)
        if not mode.is_extend():
            return
        if self.settings.pack:
            self.layout.reset(forward_batch.req_pool_indices)
        if forward_batch.rids is not None:  # None: a warm-up batch
            chunks = (
                forward_batch.rids,
                forward_batch.extend_prefix_lens_cpu,
                forward_batch.extend_seq_lens_cpu,
            )
            self.measurement = plan_measurement(self.table, *chunks, self.req_to_token)
            self.ending = ending_prompts(self.table, *chunks)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Tables at fixed addresses. Every captured batch size uses the front of the same ones."""
        if not self.settings.pack:
            raise NotImplementedError(
                "--attention-backend vlcache: VLCACHE_PACK=0 builds its tables on the host;"
                " start the server with --disable-cuda-graph"
            )
        self._graph_step = DecodeStep.empty(max_bs, self._max_context(), self.device)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """The step's tables are written inside the graph, from SGLang's static batch tensors."""
        if not forward_batch.forward_mode.is_decode_or_idle():
            raise NotImplementedError(
                f"--attention-backend vlcache: got a graph of {forward_batch.forward_mode},"
                " expected decode"
            )
        self.measurement, self.ending = None, []
        self.step = self._graph_step.first(forward_batch.batch_size)

    def shared_read_ends(self, fm: Any) -> SharedReadEnds:
        """req_to_token is read in every layer, up to the last."""
        return SharedReadEnds.UNKNOWN

    # ---- forwards

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        _refuse(kwargs)
        out = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        if self.measurement is not None:
            self.measurement.add_layer(
                layer.layer_id,
                self.num_layers,
                q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
                self.token_to_kv_pool.get_key_buffer(layer.layer_id)[:, None],
                layer.scaling,
                self.settings.config.threshold,
                self.ops,
            )
        if layer.layer_id == self.num_layers - 1:
            for prompt in self.ending:
                self._compress(prompt)
        return out

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        _refuse(kwargs)
        if save_kv_cache:
            location = KVWriteLoc.for_batch(forward_batch)
            self._set_kv_buffer(forward_batch, layer, location, k, v)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        attend = self._decode_packed if self.settings.pack else self._decode_in_place
        return attend(q, layer, forward_batch).view(len(q), -1)

    def _decode_packed(self, q: Tensor, layer: Any, forward_batch: Any) -> Tensor:
        step, pool = self.step, self.token_to_kv_pool
        assert step is not None, "a decode without init_forward_metadata"
        fill_block_table(
            layer.layer_id,
            self.req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            self.layout,
            pool.num_rows,
            step.block_table,
            step.seqused_k,
        )
        return self.ops.varlen_decode(
            q,
            pool.flat[: -pool.num_rows, None],
            pool.flat[pool.num_rows :, None],
            step.cu_seqlens,
            step.cu_seqlens,
            1,
            step.block_table.shape[1],
            softmax_scale=layer.scaling,
            seqused_k=step.seqused_k,
            block_table=step.block_table,
        )

    def _decode_in_place(self, q: Tensor, layer: Any, forward_batch: Any) -> Tensor:
        num_kv_heads, d = layer.tp_k_head_num, layer.qk_head_dim
        kept = [self.kept.get(rid) if self.table.get(rid) else None for rid in forward_batch.rids]
        rows = [self.req_to_token[i] for i in forward_batch.req_pool_indices]
        block_table, seqused_k = sparse_table(
            layer.layer_id, kept, rows, forward_batch.seq_lens_cpu.tolist(), num_kv_heads
        )
        starts = torch.arange(len(seqused_k) + 1, dtype=torch.int32, device=q.device)
        k, v = (
            buffer.view(-1, 1, 1, d)
            for buffer in self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        )
        return self.ops.varlen_decode(
            q.view(len(starts) - 1, -1, d),
            k,
            v,
            starts,
            starts,
            1,
            block_table.shape[1],
            softmax_scale=layer.scaling,
            seqused_k=seqused_k,
            block_table=block_table,
        ).view(len(q), -1)

    # ---- compression

    def _compress(self, prompt: TrackedPrompt) -> None:
        plan = plan_prompt(prompt, self.table, self.ops)
        if not self.settings.pack:
            live = {rid: kept for rid, kept in self.kept.items() if self.table.get(rid)}
            self.kept = {**live, prompt.rid: KeptPositions(prompt.length, plan)}
            return
        slots = self.req_to_token[prompt.req_pool_idx, : prompt.length].contiguous()
        pack_prompt(prompt, plan, self.token_to_kv_pool, slots, self.layout, self.ops)

    def _max_context(self) -> int:
        return min(self.max_context_len, self.req_to_token.shape[1])

    def _longest(self, forward_batch: Any) -> int:
        """Host bound of the batch's lengths; the context length where the host does not know."""
        if forward_batch.seq_lens_cpu is None:
            return self._max_context()
        return int(forward_batch.seq_lens_cpu.max())


def _refuse(kwargs: dict[str, Any]) -> None:
    """SGLang's attention variants that the kernels do not have."""
    for name, value in kwargs.items():
        if value is not None:
            raise NotImplementedError(f"--attention-backend vlcache: got {name}, expected None")
