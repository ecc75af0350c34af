"""The few attributes of SGLang's request, allocator and pool that the adapter's tables use."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor


def fake_request(
    rid: str,
    row: int,
    length: int,
    image: tuple[int, int] | None,
    protected: int = 0,
    outputs: int = 0,
    max_new_tokens: int = 16,
    audio: bool = False,
) -> SimpleNamespace:
    """A request whose image lies at positions image[0] to image[1], the last included.

    It was retracted if it has `outputs`, which it prefills again.
    """
    item = fake_item([image], audio)
    return SimpleNamespace(
        rid=rid,
        origin_input_ids=list(range(length)),
        full_untruncated_fill_ids=list(range(length + outputs)),
        session=None,
        beam_group=None,
        skip_radix_cache_insert=False,
        sampling_params=SimpleNamespace(max_new_tokens=max_new_tokens),
        multimodal_inputs=None if image is None else SimpleNamespace(mm_items=[item]),
        kv=SimpleNamespace(req_pool_idx=row, cache_protected_len=protected),
    )


def fake_item(offsets: list[tuple[int, int]] | None, audio: bool = False) -> SimpleNamespace:
    """An image at these spans of positions, or a sound."""
    return SimpleNamespace(offsets=offsets, is_audio=lambda: audio)


class FakeAllocator:
    """Slots 1 to size, each free or not; freeing a free one is an error."""

    def __init__(self, size: int) -> None:
        self.is_free = torch.ones(size + 1, dtype=torch.bool)
        self.is_free[0] = False

    def alloc(self, count: int, generator: torch.Generator) -> Tensor:
        free = self.is_free.nonzero().flatten()
        slots = free[torch.randperm(len(free), generator=generator)[:count]]
        assert len(slots) == count
        self.is_free[slots] = False
        return slots

    def free(self, slots: Tensor) -> None:
        assert slots.unique().numel() == slots.numel() and 0 not in slots
        assert not self.is_free[slots].any(), "freed twice"
        self.is_free[slots] = True


class FakePool:
    """The tensors of OneTensorKVPool, filled with noise."""

    def __init__(self, num_layers: int, num_rows: int, num_kv_heads: int, d: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = num_layers, 2, num_rows, num_kv_heads, d
        buffer = torch.randn(shape, generator=generator)
        self.num_rows = num_rows
        self.k_buffer = [buffer[layer, 0] for layer in range(num_layers)]
        self.v_buffer = [buffer[layer, 1] for layer in range(num_layers)]
        self.flat = buffer.view(-1, num_kv_heads, d)
