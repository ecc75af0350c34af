"""The operations as torch.compile sees them: operators of torch.library, of the kernels' names.

Eager calls go straight to the kernels. A boundary of torch.library costs them more than their own
launch, so it is crossed only while a graph is traced; there, an operator is one node without a
break, whose shapes torch knows from its fake. On CUDA it is the kernel, on the CPU the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import append, compact, decode, descales, reference, remainder, score, select
from . import key_value_stats as key_value
from .decode import decode_workspace
from .schedule import decode_schedule
from .types import KeyValueStats, PostVisionStats, Selection

__all__ = [  # all that this folder is for, by its names
    "KeyValueStats",
    "PostVisionStats",
    "Selection",
    "append_kv",
    "compact_kv",
    "compact_kv_",
    "compact_layers",
    "decode_schedule",
    "decode_workspace",
    "kept_descales",
    "key_value_stats",
    "post_vision_stats",
    "select_tokens",
    "store_means",
    "sum_evicted",
    "varlen_decode",
]

F = TypeVar("F", bound=Callable[..., Any])

# Copies of this folder, whatever they are called, register beside each other.
LIBRARY = torch.library.Library((__package__ or __name__).replace(".", "_"), "FRAGMENT")


def _writes_only(*args: Any, **kwargs: Any) -> None:
    """The fake of an operator that returns nothing."""


def _operator(
    kernel: Callable, schema: str, fake: Callable = _writes_only, **fixed: Any
) -> Callable:
    """Register a kernel and its twin of the reference. The schema says what they write."""
    name = kernel.__name__
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, functools.partial(kernel, **fixed), "CUDA")
    LIBRARY.impl(name, functools.partial(getattr(reference, name), **fixed), "CPU")
    torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, LIBRARY.ns), name)


def _compilable(kernel: F, compiled: Callable) -> F:
    """The kernel; while torch.compile traces, what it is to see of it."""

    @functools.wraps(kernel)
    def operation(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return compiled(*args, **kwargs)
        return kernel(*args, **kwargs)

    return operation  # type: ignore[return-value]


def _fake_stats(
    q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, block_table=None, **options
):
    num_seqs, paged = cu_seqlens_q.shape[0] - 1, block_table is not None
    total_k = num_seqs * max_seqlen_k if paged else k.shape[0]
    return (
        q.new_empty(k.shape[-2], total_k, dtype=torch.float32),
        q.new_empty(num_seqs, q.shape[1], dtype=torch.int64),
        q.new_empty(num_seqs, dtype=torch.int64),
    )


def _fake_key_value_stats(k, v, cu_seqlens_k, max_seqlen_k, *, block_table=None, **options):
    num_seqs, (num_kv_heads, d) = cu_seqlens_k.shape[0] - 1, k.shape[-2:]
    total_k = k.shape[0] if block_table is None else num_seqs * max_seqlen_k
    shapes = ((num_seqs, num_kv_heads, d), (num_seqs, num_kv_heads), *[(num_kv_heads, total_k)] * 2)
    return tuple(k.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _fake_selection(scores, cu_seqlens, keep, recent, *, max_seqlen, total_kept=None):
    size = scores.numel() if total_kept is None else total_kept
    num_segments = keep.numel() * scores.shape[-2]
    return keep.new_empty(size), keep.new_empty(num_segments + 1)


def _fake_descales(k, v, cu_seqlens_k, indices, cu_kept, **options):
    num_layers = len(k)
    num_segments = (cu_kept.shape[0] - 1) // num_layers
    k_descale, v_descale = (
        cu_kept.new_empty(num_layers, num_segments, 1, dtype=torch.float32) for _ in range(2)
    )
    return k_descale, v_descale


def _fake_sums(k, v, cu_seqlens_k, indices, cu_kept, max_seqlen_k, **options):
    chunks = 1 if k.device.type == "cpu" else remainder.num_chunks(max_seqlen_k)
    return tuple(
        x.new_empty(cu_kept.shape[0] - 1, chunks, x.shape[-1], dtype=torch.float32) for x in (k, v)
    )


def _fake_decode(q, k, v, *args, **options):
    total_q, num_heads = q.shape[:2]
    out = q.new_empty(total_q, num_heads, v.shape[-1])
    return out, q.new_empty(num_heads, total_q, dtype=torch.float32)


_post_vision_stats = _operator(
    score.post_vision_stats,
    "(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, *, float? softmax_scale=None, float threshold=0.01,"
    " float softcap=0.0, Tensor? seqused_k=None, Tensor? block_table=None, Tensor? sinks=None,"
    ' Tensor? row_weights=None, str row_reduction="sum", str group_reduction="mean")'
    " -> (Tensor, Tensor, Tensor)",
    _fake_stats,
)
_key_value_stats = _operator(
    key_value.key_value_stats,
    "(Tensor k, Tensor v, Tensor cu_seqlens_k, SymInt max_seqlen_k, *, Tensor? seqused_k=None,"
    " Tensor? block_table=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_key_value_stats,
)
_select_tokens = _operator(
    select.select_tokens,
    "(Tensor scores, Tensor cu_seqlens, Tensor keep, Tensor recent, *, SymInt max_seqlen,"
    " SymInt? total_kept=None) -> (Tensor, Tensor)",
    _fake_selection,
)
_compact_kv = _operator(
    compact.compact_kv,
    "(Tensor k, Tensor v, Tensor? cu_seqlens_k, Tensor indices, Tensor cu_kept, Tensor(a!) out_k,"
    " Tensor(b!) out_v, Tensor? cu_seqlens_out, *, SymInt max_kept, Tensor? block_table=None,"
    " Tensor? out_block_table=None, Tensor? k_descale=None, Tensor? v_descale=None) -> ()",
)
_compact_kv_in_place = _operator(
    compact.compact_kv_,
    "(Tensor(a!) k, Tensor(b!) v, Tensor? cu_seqlens_k, Tensor indices, Tensor cu_kept, *,"
    " SymInt max_kept, Tensor? block_table=None) -> ()",
)
_compact_layers = _operator(
    compact.compact_layers,
    "(Tensor[] k, Tensor[] v, Tensor cu_seqlens_k, Tensor indices, Tensor cu_kept,"
    " Tensor(a!) out_k, Tensor(b!) out_v, Tensor cu_seqlens_out, *, SymInt max_kept,"
    " Tensor? k_descale=None, Tensor? v_descale=None) -> ()",
)
_kept_descales = _operator(
    descales.kept_descales,
    "(Tensor[] k, Tensor[] v, Tensor? cu_seqlens_k, Tensor indices, Tensor cu_kept, *,"
    " SymInt max_kept, Tensor? block_table=None) -> (Tensor, Tensor)",
    _fake_descales,
)
_sum_evicted = _operator(
    remainder.sum_evicted,
    "(Tensor k, Tensor v, Tensor? cu_seqlens_k, Tensor indices, Tensor cu_kept,"
    " SymInt max_seqlen_k, *, Tensor? seqused_k=None, Tensor? block_table=None)"
    " -> (Tensor, Tensor)",
    _fake_sums,
)
_store_means = _operator(
    remainder.store_means,
    "(Tensor sum_k, Tensor sum_v, Tensor counts, Tensor(a!) out_k, Tensor(b!) out_v,"
    " Tensor? cu_seqlens_out, *, Tensor? out_block_table=None, Tensor? k_descale=None,"
    " Tensor? v_descale=None) -> ()",
)
_varlen_decode = _operator(
    decode.varlen_decode,
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor? cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, *, float? softmax_scale=None, bool causal=False,"
    " SymInt[2] window_size=[-1, -1], float softcap=0.0, Tensor? seqused_k=None,"
    " Tensor? block_table=None, Tensor? first_key_bias=None, Tensor? sinks=None,"
    " SymInt num_splits=0, Tensor? k_descale=None, Tensor? v_descale=None) -> (Tensor, Tensor)",
    _fake_decode,
    return_softmax_lse=True,
)
_append_kv = _operator(
    append.append_kv,
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? cu_seqlens_k,"
    " Tensor(c!) seqused_k, *, Tensor? block_table=None, Tensor? k_descale=None,"
    " Tensor? v_descale=None) -> ()",
)


def _compiled_stats(*args: Any, **kwargs: Any) -> PostVisionStats:
    return PostVisionStats(*_post_vision_stats(*args, **kwargs))


def _compiled_key_value_stats(*args: Any, **kwargs: Any) -> KeyValueStats:
    return KeyValueStats(*_key_value_stats(*args, **kwargs))


def _compiled_selection(*args: Any, **kwargs: Any) -> Selection:
    return Selection(*_select_tokens(*args, **kwargs))


def _compiled_decode(
    *args: Any,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,  # the graph's memory is torch.compile's
    schedule: Tensor | None = None,  # of launches alone
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    result, lse = _varlen_decode(*args, **kwargs)
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_softmax_lse else result


post_vision_stats = _compilable(score.post_vision_stats, _compiled_stats)
key_value_stats = _compilable(key_value.key_value_stats, _compiled_key_value_stats)
select_tokens = _compilable(select.select_tokens, _compiled_selection)
compact_kv = _compilable(compact.compact_kv, _compact_kv)
compact_kv_ = _compilable(compact.compact_kv_, _compact_kv_in_place)
compact_layers = _compilable(compact.compact_layers, _compact_layers)
kept_descales = _compilable(descales.kept_descales, _kept_descales)
sum_evicted = _compilable(remainder.sum_evicted, _sum_evicted)
store_means = _compilable(remainder.store_means, _store_means)
varlen_decode = _compilable(decode.varlen_decode, _compiled_decode)
append_kv = _compilable(append.append_kv, _append_kv)
