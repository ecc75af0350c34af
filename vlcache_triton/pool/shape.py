"""Shapes of memory for K and V: what was made for one serves every prompt of an equal one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """What segments and rings have in common; `head_size` is of K, `v_head_size` of V."""

    num_layers: int
    num_seqs: int
    num_kv_heads: int
    head_size: int
    v_head_size: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class PoolShape(KVShape):
    """Of a `RaggedCache`.

    capacity: rows of the pools, fewer than 2**31: they are counted in int32.
    max_seqlen_k: rows of the longest segment, head room included; more makes larger grids.
    has_remainder: whether first rows may stand for what was evicted.
    is_fp8: whether rows are stored in fp8 (e4m3); `dtype` is what they are made of, and read as.
    """

    capacity: int
    max_seqlen_k: int
    has_remainder: bool = False
    is_fp8: bool = False

    def __post_init__(self) -> None:
        if self.capacity >= 2**31:
            raise ValueError(f"capacity: got {self.capacity} rows, expected fewer than 2**31")


@dataclass(frozen=True, kw_only=True)
class RingShape(KVShape):
    """Of `WindowRings`.

    window: tokens that a row sees, itself included; with `is_chunked`, the length of the chunks,
        counted from the first real token, whose rows see each other.
    """

    window: int
    is_chunked: bool


def kind_of(k: Tensor, v: Tensor) -> dict[str, Any]:
    """What a shape takes from tensors `[..., d]` and `[..., d_v]`."""
    sizes = {"head_size": k.shape[-1], "v_head_size": v.shape[-1]}
    return {**sizes, "dtype": k.dtype, "device": k.device}
