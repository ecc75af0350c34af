"""A KV pool whose layers are views of one tensor, so that a slot can lend its cells to any layer.

SGLang's scheduler hands out slots: one row in every layer. Layers keep different numbers of
tokens, so no layer alone decides how many slots a prompt needs. Here any (layer, slot) cell is a
row of one flat view, and the kept tokens of all layers, Σ k_l of them, fill ceil(Σ k_l / L) slots
whatever the skew between layers.
"""

from __future__ import annotations

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool


class OneTensorKVPool(MHATokenToKVPool):
    """SGLang's pool, allocated as one tensor `[num_layers, 2, num_rows, num_kv_heads, d]`.

    flat: the same memory as `[num_layers * 2 * num_rows, num_kv_heads, d]`; K of (layer, slot) is
        row 2 * layer * num_rows + slot, V lies num_rows behind it.
    """

    flat: torch.Tensor
    num_rows: int

    def _create_buffers_normal(self) -> None:
        shape, v_shape = self._kv_buffer_shapes()
        if shape != v_shape or self.kv_cache_layout != "nhd":
            raise NotImplementedError(
                f"--attention-backend vlcache: got KV rows of shape {shape} and {v_shape} in layout"
                f" {self.kv_cache_layout!r}, expected equal shapes in layout 'nhd'"
            )
        if self.enable_custom_mem_pool:
            raise NotImplementedError(
                "--attention-backend vlcache: got a custom memory pool for KV, expected none"
            )
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            buffer = torch.zeros(
                (self.layer_num, 2, *shape), dtype=self.store_dtype, device=self.device
            )
        self.num_rows = shape[0]
        self.k_buffer = [buffer[layer, 0] for layer in range(self.layer_num)]
        self.v_buffer = [buffer[layer, 1] for layer in range(self.layer_num)]
        self.flat = buffer.view(-1, *shape[1:])

    def _alloc_post_capture_buffers(self) -> None:
        raise NotImplementedError(
            "--attention-backend vlcache: got SGLANG_ENABLE_POST_CAPTURE_KV_SIZING, which reserves"
            " each layer's KV apart and sizes it after graphs are captured; expected it to be 0, so"
            " that the pool is one tensor"
        )
