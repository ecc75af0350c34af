"""What `kernels benchmark` times, and holds to plain torch: a prompt of 8K, a tenth of it kept."""

from __future__ import annotations

import torch
from kernels.benchmark import Benchmark
from torch import Tensor


class VlcacheTritonBenchmark(Benchmark):
    """One layer of a 7B model: 32 query heads on 8 KV heads of 128."""

    seed = 0
    num_heads, num_kv_heads, head_size = 32, 8, 128
    num_keys, num_rows, num_kept = 8192, 32, 816

    def setup(self) -> None:
        """One sequence, and a pool with a segment for each of its KV heads."""
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float16

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, dtype=dtype)

        def starts(num: int, length: int) -> Tensor:
            return torch.arange(num + 1, device=self.device, dtype=torch.int32) * length

        self.q = normal(self.num_rows, self.num_heads, self.head_size)
        self.k, self.v = (normal(self.num_keys, self.num_kv_heads, self.head_size) for _ in "kv")
        self.starts_q, self.starts_k = starts(1, self.num_rows), starts(1, self.num_keys)
        self.pool_k, self.pool_v = (
            normal(self.num_kv_heads * self.num_kept, 1, self.head_size) for _ in "kv"
        )
        self.pool_starts = starts(self.num_kv_heads, self.num_kept)
        self.step_q = normal(self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_size)
        self.step_starts = starts(self.num_kv_heads, 1)
        self.scores = torch.rand(self.num_kv_heads, self.num_keys, device=self.device)
        self.keep = torch.full((1,), self.num_kept, dtype=torch.int32, device=self.device)
        self.recent = self.keep // 10
        self.selection = self.select()

    def select(self):
        """The last tokens, and the Top-K of the rest."""
        return self.kernel.select_tokens(
            self.scores,
            self.starts_k,
            self.keep,
            self.recent,
            max_seqlen=self.num_keys,
            total_kept=self.num_kv_heads * self.num_kept,
        )

    def benchmark_post_vision_stats(self) -> None:
        """Scores of a layer."""
        lengths = self.num_rows, self.num_keys
        args = self.q, self.k, self.starts_q, self.starts_k, *lengths
        self.out = self.kernel.post_vision_stats(*args).scores

    def verify_post_vision_stats(self) -> Tensor:
        """The attention matrix, and its sum over rows."""
        group = self.num_heads // self.num_kv_heads
        keys = self.k.float().repeat_interleave(group, 1)
        logits = torch.einsum("qhd,khd->hqk", self.q.float(), keys) * self.head_size**-0.5
        hidden = torch.ones(self.num_rows, self.num_keys, dtype=torch.bool, device=self.device)
        hidden = hidden.triu(self.num_keys - self.num_rows + 1)
        attention = logits.masked_fill(hidden, -torch.inf).softmax(-1).sum(1)
        return attention.view(self.num_kv_heads, group, -1).mean(1)

    def benchmark_select_tokens(self) -> None:
        """Positions that are kept."""
        self.out = self.select().indices

    def verify_select_tokens(self) -> Tensor:
        """torch.topk and a sort."""
        recent = int(self.recent)
        ranked = self.scores[:, : self.num_keys - recent]
        top = ranked.topk(self.num_kept - recent).indices.sort().values.int()
        last = torch.arange(self.num_keys - recent, self.num_keys, device=self.device)
        return torch.cat([top, last.int().expand(self.num_kv_heads, -1)], 1).flatten()

    def benchmark_compact_kv(self) -> None:
        """Kept rows into the pool."""
        self.kernel.compact_kv(
            *(self.k, self.v, self.starts_k, *self.selection),
            *(self.pool_k, self.pool_v, self.pool_starts),
            max_kept=self.num_kept,
        )
        self.out = self.pool_k

    def verify_compact_kv(self) -> Tensor:
        """Advanced indexing, a head at a time."""
        kept = self.selection.indices.view(self.num_kv_heads, -1).long()
        return torch.cat([self.k[kept[h], h] for h in range(self.num_kv_heads)])[:, None]

    def benchmark_varlen_decode(self) -> None:
        """A step of one token over the pool."""
        self.out = self.kernel.varlen_decode(
            *(self.step_q, self.pool_k, self.pool_v, self.step_starts, self.pool_starts),
            *(1, self.num_kept),
        )

    def verify_varlen_decode(self) -> Tensor:
        """torch's attention."""
        q, k, v = (
            x.view(self.num_kv_heads, -1, self.head_size).float()
            for x in (self.step_q, self.pool_k, self.pool_v)
        )
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).to(self.step_q.dtype)
