"""The scale that each segment of an fp8 pool has, from what is kept of it.

One launch finds the largest magnitudes of all layers, and compaction rounds rows to them while it
moves. Kept rows alone are read for it, once more than they have to be moved: of a prompt of which a
tenth is kept, a tenth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import expect, expect_array
from .compact import check_layers, check_selection, layers_alike, moving_launch, of_layers
from .descales_kernels import _kept_amax_kernel
from .launch import current
from .types import FP8_MAX, FP8_ROOM


def kept_descales(
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    cu_seqlens_k: Tensor | None,
    indices: Tensor,
    cu_kept: Tensor,
    *,
    max_kept: int,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales by which the kept rows of layers fit into fp8 (e4m3): stored value * descale = row.

    Of a segment, its largest kept magnitude / 448, times 2 for larger tokens to come; 1 where all
    kept rows are 0, or none is kept.

    Args:
        k, v: for each layer `[total_k, num_kv_heads, d]` (`d_v` for v), or pages
            `[num_blocks, page_size, num_kv_heads, d]`, of one shape; any strides whose last is 1.
        cu_seqlens_k: `[num_seqs + 1]` int32, whose starts alone are used; unused for pages, where
            it may be None.
        indices, cu_kept: a Selection of these layers, as for `compact_layers`: cu_kept is
            `[num_layers * num_seqs * num_kv_heads + 1]` int32 and may start above 0.
        max_kept: host upper bound of the kept tokens of a segment, of any layer.
        block_table: `[num_seqs, max_blocks]` int32, of all layers.

    Returns:
        k_descale and v_descale, `[num_layers, num_seqs * num_kv_heads, 1]` fp32, whose layers
        `compact_kv`, `append_kv` and `varlen_decode` take.

    Raises:
        ValueError: an argument that does not fit the others, by name.
        NotImplementedError: a dtype that is not fp16, bf16 or fp32.
    """
    num_layers = len(k)
    expect(num_layers > 0, "k", "no layers", "one at least")
    check_layers(k, v)
    num_segments = max(cu_kept.numel() - 1, 0) // num_layers
    of_one = cu_kept[: num_segments + 1]
    check_selection(k[0], v[0], cu_seqlens_k, indices, of_one, block_table)
    expect_array("cu_kept", cu_kept, (num_layers * num_segments + 1,))
    amax = torch.zeros(2, num_layers, num_segments, dtype=torch.int32, device=k[0].device)
    if num_segments > 0 and max_kept > 0:
        alike = layers_alike(k, v) if num_layers > 1 else [(0, None, False)]
        for like, layers, aligned in alike:
            launch = moving_launch(k[like], v[like], block_table, num_segments, max_kept)
            num_alike = 1 if layers is None else len(layers)
            with current(k[0].device):
                _kept_amax_kernel.run(
                    **of_layers(launch, num_alike, num_segments, aligned),
                    k_ptr=k[like],
                    v_ptr=v[like],
                    layers_ptr=layers,
                    cu_seqlens_k_ptr=cu_seqlens_k,
                    indices_ptr=indices,
                    cu_kept_ptr=cu_kept,
                    block_table_ptr=block_table,
                    amax_k_ptr=amax[0],
                    amax_v_ptr=amax[1],
                )
    k_amax, v_amax = amax.view(torch.float32)[..., None]
    return _descale_of(k_amax), _descale_of(v_amax)


def _descale_of(amax: Tensor) -> Tensor:
    # Multiplied: torch divides by a number in another way on a GPU than on the CPU.
    descale = (amax * (FP8_ROOM / FP8_MAX)).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(amax > 0, descale, 1.0)
