"""What is in a VLCache, by its state: empty, dense, reading a prompt, packed. No Transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlcache_triton import VLCacheConfig
from vlcache_triton.ops import BackendName, get_backend
from vlcache_triton.pool.allocator import PoolAllocator
from vlcache_triton.pool.compress import PromptCompressor
from vlcache_triton.pool.packed import PackedCache
from vlcache_triton.pool.ragged import RaggedCache
from vlcache_triton.pool.streaming import StreamingCompressor
from vlcache_triton.recipe.plan import CompressionPlan
from vlcache_triton.recipe.policies import Policy
from vlcache_triton.recipe.prompt import Prompt
from vlcache_triton.recipe.report import CompressionReport, sparsity_of
from vlcache_triton.recipe.softmax import Softmax
from vlcache_triton.recipe.turn import TurnCompressor


class Empty:
    """Nothing is in it, and no prompt has been announced."""


class Dense:
    """A prompt that is left whole: every layer keeps its rows as Transformers does."""


class Reading:
    """The pass of a prompt that is to be packed: layers hand their rows over, the last one packs.

    num_past: tokens of the prompt that are in the layers from before, whole.
    compresses: False for a prompt that is packed whole.
    compressor: what takes the layers; None before the first.
    """

    def __init__(self, prompt: Prompt, num_past: int, compresses: bool) -> None:
        self.prompt, self.num_past, self.compresses = prompt, num_past, compresses
        self.compressor: PromptCompressor | None = None


class Contents:
    """What a VLCache and its layers share.

    state: Empty, then Dense or Reading, then PackedCache; only `clear` leads back.
    prompt: the one that was announced last.
    turn: what measures a pass over a packed cache, while it runs; None where nothing does.
    plan: what was kept of the prompt, or of the latest turn that was compressed, whose positions
        count from its first token; None where nothing was compressed.
    report: what compression has done so far; None likewise.
    allocator: where packed memory comes from; None for memory of one's own.
    make_compressor: makes what takes a prompt's layers; called as PromptCompressor is.
    packs_whole: whether even prompts that are not compressed are packed.

    Args:
        layers: the model's indices of the layers that are compressed.
        head_room: rows reserved for new tokens when a prompt is packed.
    """

    def __init__(
        self,
        layers: Sequence[int],
        config: VLCacheConfig,
        policy: Policy,
        backend_name: BackendName,
        head_room: int,
        streaming: bool,
        allocator: PoolAllocator | None,
    ) -> None:
        self.layers, self.config, self.policy = list(layers), config, policy
        self.backend_name, self.head_room = backend_name, head_room
        self.make_compressor: Callable[..., PromptCompressor] = (
            StreamingCompressor if streaming else PromptCompressor
        )
        self.allocator, self.packs_whole = allocator, allocator is not None
        self.clear()

    def clear(self) -> None:
        """Empty; packed memory goes back to where it was lent."""
        self.state: Empty | Dense | Reading | PackedCache = Empty()
        self.prompt: Prompt | None = None
        self.turn: TurnCompressor | None = None
        self.plan: CompressionPlan | None = None
        self.report: CompressionReport | None = None

    @property
    def packed(self) -> PackedCache | None:
        """The packed cache, once there is one."""
        return self.state if isinstance(self.state, PackedCache) else None

    @property
    def reading(self) -> Reading | None:
        """The prompt's pass, while it runs."""
        return self.state if isinstance(self.state, Reading) else None

    def begin(self, prompt: Prompt, num_past: int) -> None:
        """Announce the prompt whose forward pass comes next."""
        compresses = prompt.is_compressible and not self.config.is_lossless
        packs = compresses or self.packs_whole
        self.prompt = prompt
        self.state = Reading(prompt, num_past, compresses) if packs else Dense()

    def add_layer(self, k: Tensor, v: Tensor, query: Tensor, softmax: Softmax) -> None:
        """Take a layer of the prompt that is being read; arguments as `PromptCompressor.add`."""
        reading = self.reading
        assert reading is not None
        if reading.compressor is None:
            backend = get_backend(self.backend_name, k.device)
            reading.compressor = self.make_compressor(
                reading.prompt, len(self.layers), self.config, backend, self.policy
            )
        with torch.no_grad():
            reading.compressor.add(k, v, query.detach(), softmax)
            if reading.compressor.num_added == len(self.layers):
                self._pack(reading.prompt, reading.compressor)

    def _pack(self, prompt: Prompt, compressor: PromptCompressor) -> None:
        packed = PackedCache(prompt.pads, prompt.padded_length)
        allocate: Callable[..., RaggedCache] = RaggedCache
        if self.allocator is not None:
            allocate = functools.partial(self.allocator.allocate, owner=packed)
        plan, packed.ragged = compressor.pack(self.head_room, allocate)
        if compressor.compresses:
            self.plan = plan
            self.report = CompressionReport.of(
                plan,
                self.config.budget,
                self.layers,
                compressor.bytes_seen,
                packed.ragged.nbytes,
                packed.ragged.row_nbytes,
            )
        self.state = packed

    def hold(self, plan: CompressionPlan, ragged: RaggedCache) -> None:
        """Take what has been packed elsewhere, in place of reading a prompt."""
        packed = PackedCache(plan.prompt.pads, plan.prompt.padded_length)
        packed.ragged = ragged
        self.prompt, self.plan, self.state = plan.prompt, plan, packed

    def begin_step(
        self,
        num_rows: int,
        is_pad: Tensor | None = None,
        turn: Prompt | None = None,
    ) -> None:
        """Announce a pass over the packed cache; arguments as `PackedCache.begin_step`, and
        `TurnCompressor`, where the pass is to be measured."""
        packed = self.packed
        assert packed is not None
        self.turn = None
        if turn is not None:
            backend = packed.ragged.backend
            self.turn = TurnCompressor(turn, self.config, backend, self.policy)
        packed.begin_step(num_rows, is_pad)

    def measure_turn(self, layer: int, query: Tensor, softmax: Softmax) -> None:
        """Measure a layer of the pass, once its rows are in their segments."""
        assert self.packed is not None and self.turn is not None
        ragged = self.packed.ragged
        bias = None if ragged.first_key_bias is None else ragged.first_key_bias[layer]
        with torch.no_grad():
            k, v = ragged.padded(layer)
            self.turn.add(query.detach(), k, v, ragged.seqused_k[layer], softmax, bias)

    def end_turn(self) -> PackedCache | None:
        """Evict, behind a pass that was measured: a packed cache in place of the one before; None
        where nothing was."""
        turn, packed, self.turn = self.turn, self.packed, None
        if turn is None or packed is None:
            return None
        num_evicted = packed.ragged.num_evicted
        with torch.no_grad():
            eviction = turn.decide(
                packed.ragged.seqused_k.long().cpu(),
                None if num_evicted is None else num_evicted.long().cpu(),
            )
            self.state = packed.evict(
                eviction, self.head_room, self.allocator, is_fp8=self.config.is_fp8
            )
        self.plan = eviction.plan or self.plan
        self.report = self._report_turn(self.state, eviction.plan)
        return self.state

    def stop_reading(self) -> bool:
        """At the end of a pass: a prompt that is still being read stays dense, as far as it is
        there. True where it was to be compressed."""
        reading = self.reading
        if reading is None:
            return False
        self.state = Dense()
        return reading.compresses

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: all but the lender of memory, who is of one block."""
        if self.reading is not None or (self.packed is not None and self.packed.step_rows > 0):
            raise ValueError("VLCache: got one amid a forward pass, expected one between passes")
        return {**vars(self), "allocator": None, "packs_whole": False, "turn": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.packed is not None:
            ragged = self.packed.ragged
            ragged.backend = get_backend(self.backend_name, ragged.k.device)

    def _report_turn(
        self, packed: PackedCache, plan: CompressionPlan | None
    ) -> CompressionReport | None:
        """The report as of this turn: a row more, or, of a text that was cut, the same one."""
        ragged, before = packed.ragged, self.report
        num_seqs, segments = ragged.num_seqs, 0 if before is None else before.segments
        rows = ragged.seqused_k.long().cpu().view(len(self.layers), num_seqs, -1)
        num_before = len(self.layers) * num_seqs * packed.num_seen * ragged.num_kv_heads
        dense_row_nbytes = ragged.row_nbytes // ragged.k.element_size() * ragged.dtype.itemsize
        return CompressionReport(
            budget=self.config.budget,
            layers=self.layers,
            sparsity=sparsity_of(plan) if plan is not None else before.sparsity if before else [],
            kept=(rows.sum(-1) // ragged.num_kv_heads).tolist(),
            lengths=[packed.num_seen - pads for pads in packed.num_pads],
            bytes_before=num_before * dense_row_nbytes,
            bytes_after=int(rows.sum()) * ragged.row_nbytes,
            bytes_allocated=ragged.nbytes,
            segments=segments + (plan is not None),
        )
