"""The cache object: dense during prefill, ragged per KV head once the prompt is compressed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import isnan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from vlcache_triton import VLCacheConfig
from vlcache_triton.ops import BackendName, get_backend
from vlcache_triton.pool.compress import PromptCompressor
from vlcache_triton.pool.ragged import RaggedCache
from vlcache_triton.pool.streaming import StreamingCompressor
from vlcache_triton.recipe.plan import CompressionPlan
from vlcache_triton.recipe.policies import VL_CACHE, Policy
from vlcache_triton.recipe.prompt import Prompt
from vlcache_triton.recipe.report import CompressionReport

from .layers import VLCacheLayer, WindowLayer
from .support import check_choices, check_config, describe_model, layer_types, window_of

if TYPE_CHECKING:
    from vlcache_triton.pool.rings import WindowRings

    from .graph import DecodeGraphs

MAX_HEAD_ROOM = 256  # rows reserved for new tokens at compression; a longer answer grows the pools


class VLCache(Cache):
    """A KV cache that compresses itself once, at the end of the prompt's forward pass.

    Full-attention layers are compressed; sliding and chunked layers keep their windows. Use it
    inside `with vl_cache(model, ...)`, where each prompt finds its boundary; tokens after the
    prompt (answers, later turns) are kept whole. At budget 1.0, and for prompts without
    post-vision rows, it is a dynamic cache.

    One image, many questions: `copy.deepcopy(cache)` for each question that is asked behind the
    prompt; a copy has memory of its own. `torch.save(cache, file)` and, in another process,
    `torch.load(file, weights_only=False)` (as pickles run code, of files that you trust) do for
    later questions. Copied and saved between passes, and used inside any `vl_cache` block of the
    same model; another one is refused. A copy decodes with its block's captured steps.

    made_for: the model, by its type, its name or folder, and its text configuration's sizes.

    Args:
        model_config: `model.config`.
        config: the choices of compression.
        policy: what ranks tokens and shares the budget out; VL-Cache, or one of its rivals.
        max_new_tokens: tokens expected after the prompt; sizes the head room. More tokens are
            taken all the same, for a copy of the compressed cache now and then.
        backend: see `get_backend`.
        streaming: compress during prefill, so that the dense cache of all layers never exists at
            once; the same result, for a host sync a layer (see `StreamingCompressor`).
        graphs: whose captured steps decode on this cache; even a whole prompt is packed then.

    Raises:
        ValueError: for what is no configuration or policy.
        NotImplementedError: for models that VL-Cache is not defined on, and for another policy
            with streaming, which is exact for VL-Cache's budgets alone.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: VLCacheConfig | None = None,
        *,
        policy: Policy = VL_CACHE,
        max_new_tokens: int = MAX_HEAD_ROOM,
        backend: BackendName = "auto",
        streaming: bool = False,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected an int >= 1")
        config = VLCacheConfig() if config is None else config
        check_choices(config, policy, streaming)
        check_config(model_config)
        self.made_for = describe_model(model_config)
        text_config = model_config.get_text_config(decoder=True)
        layers: list[Any] = []
        self._num_layers = 0  # of full attention
        self._window_layers: list[WindowLayer] = []
        self._window, self._is_chunked = window_of(text_config)
        for layer_type in layer_types(text_config):
            if layer_type == "full_attention":
                layers.append(VLCacheLayer(self, self._num_layers))
                self._num_layers += 1
            else:
                layers.append(WindowLayer(self, len(self._window_layers), self._window))
                self._window_layers.append(layers[-1])
        super().__init__(layers=layers)
        self.config, self.policy = policy.configure(config), policy
        self.backend_name: BackendName = backend
        self.head_room = min(max_new_tokens, MAX_HEAD_ROOM)
        self.streaming, self.graphs = streaming, graphs
        self._forget()

    def _forget(self) -> None:
        self.prompt: Prompt | None = None
        self.plan: CompressionPlan | None = None
        self.ragged: RaggedCache | None = None
        self.windows: WindowRings | None = None
        self.num_seen = 0  # tokens, while compressed
        self.pads: tuple[int, ...] = ()  # of each sequence
        # Of the last rows of the latest pass `[..., num_seqs, 1]`, if it was given any.
        self.position_ids: Tensor | None = None
        # What the model has noted on itself, `[num_seqs, 1]` each (see rope_state.py).
        self.rope_deltas: Sequence[Tensor | None] = ()
        self._step_rows = 0
        self._compressor: PromptCompressor | None = None
        self._report: CompressionReport | None = None

    @property
    def will_compress(self) -> bool:
        """Whether the current prompt is to be compressed, or has been."""
        return (
            self.prompt is not None and self.prompt.is_compressible and not self.config.is_lossless
        )

    @property
    def will_pack(self) -> bool:
        """Whether the current prompt goes, or has gone, into a ragged cache: to be compressed, or
        whole, for captured steps to decode on."""
        return self.will_compress or (self.prompt is not None and self.graphs is not None)

    @property
    def is_compressed(self) -> bool:
        """Whether the prompt has been compressed."""
        return self.will_compress and self.ragged is not None

    @property
    def num_seqs(self) -> int:
        """Sequences of the batch."""
        return len(self.pads)

    @property
    def is_in_step(self) -> bool:
        """Whether a forward pass over the compressed cache is running."""
        return self._step_rows > 0

    def begin(self, prompt: Prompt, num_past: int = 0) -> None:
        """Announce the prompt whose forward pass comes next; its first num_past tokens are all
        that is in the cache, whole."""
        if self.get_seq_length() != num_past or self.ragged is not None:
            raise ValueError(
                f"cache: got {self.get_seq_length()} tokens in it, expected {num_past}"
            )
        self.prompt, self.pads, self.num_seen = prompt, prompt.pads, num_past

    def decode_with(self, graphs: DecodeGraphs) -> None:
        """Move to where captured steps can read it what is packed already: of a copy, of a cache
        from a file or from another block."""
        if self.graphs is graphs:
            return
        packed, windows = self.ragged, self.windows
        if packed is not None:
            self.ragged = None  # who borrows has the loan, or nothing yet
            moved = packed
            try:
                moved = packed.copy(functools.partial(graphs.allocate, self))
            finally:
                self.ragged = moved
            if windows is not None:
                like = windows.k[0], windows.v[0]
                self.windows = graphs.lend_windows(
                    self, self._window, self._is_chunked, len(windows.k), *like
                )
                self.windows.take(windows)
            elif self._window_layers:
                self._make_rings(graphs)
        self.graphs = graphs

    def begin_step(self, num_rows: int) -> None:
        """Announce a forward pass of `num_rows` tokens a sequence over the compressed cache."""
        if self.ragged is not None:
            self.ragged.reserve(num_rows)
            if self.windows is not None:
                self.windows.advance(self.num_seen, num_rows)
            self._step_rows = num_rows

    def end_step(self) -> None:
        """Count the rows of the pass that was announced: once, for all layers."""
        if self.ragged is not None:
            if self._window_layers and self.graphs is not None and self.windows is None:
                self._make_rings(self.graphs)
            self.ragged.room -= self._step_rows
            self.num_seen += self._step_rows
            self._step_rows = 0

    def take_back(self, num_rows: int) -> None:
        """Forget the last rows of every sequence: of steps that had run past the answer's end."""
        if num_rows > 0:
            assert self.ragged is not None
            self.ragged.seqused_k -= num_rows
            self.ragged.room += num_rows
            self.num_seen -= num_rows
            if self.windows is not None:
                self.windows.take_back(self.num_seen)

    def check_step(self, num_rows: int) -> None:
        """Refuse rows that nobody announced: the attention would not see the cache either."""
        if num_rows != self._step_rows:
            raise RuntimeError(
                f"VLCache: got {num_rows} rows in a step of {self._step_rows}, expected a forward"
                " pass inside the vl_cache block"
            )

    def compress_layer(self, k: Tensor, v: Tensor, query: Tensor, softmax_scale: float) -> None:
        """Take a layer of the prompt; the last one makes the cache ragged.

        Args: as `PromptCompressor.add`.
        """
        assert self.prompt is not None
        if self._compressor is None:
            backend = get_backend(self.backend_name, k.device)
            make = StreamingCompressor if self.streaming else PromptCompressor
            self._compressor = make(
                self.prompt, self._num_layers, self.config, backend, self.policy
            )
        compressor = self._compressor
        with torch.no_grad():
            compressor.add(k, v, query.detach(), softmax_scale)
            if compressor.num_added < self._num_layers:
                return
            allocate: Any = RaggedCache
            if self.graphs is not None:
                allocate = functools.partial(self.graphs.allocate, self)
            plan, self.ragged = compressor.pack(self.head_room, allocate)
        self._compressor = None
        self.num_seen = self.prompt.padded_length
        if self.will_compress:
            self.plan = plan
            self._report = self._make_report(plan, compressor.bytes_seen, self.ragged.nbytes)

    def _make_rings(self, graphs: DecodeGraphs) -> None:
        """Move what the prompt's pass has left in the window layers to where steps can read it."""
        rows: list[Any] = [(layer.keys, layer.values) for layer in self._window_layers]
        shape = (self._window, self._is_chunked, len(rows), *rows[0])
        self.windows = graphs.lend_windows(self, *shape)
        self.windows.fill(rows, self.pads, self.num_seen)
        for layer in self._window_layers:
            layer.keys = layer.values = None

    def report(self) -> CompressionReport | None:
        """What compression did; None where nothing was compressed."""
        return self._report

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i what sequence beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        self.rope_deltas = [
            x[indices.to(x.device)] if x is not None and len(x) == self.num_seqs else x
            for x in self.rope_deltas
        ]
        layers: list[Any] = self.layers if self.ragged is None else self._window_layers
        if self.windows is not None:
            self.windows.select_sequences(indices)
            layers = []
        for layer in layers:
            layer.batch_select_indices(indices)
        if self.ragged is not None:
            self.ragged.select_sequences(indices)
            self.pads = tuple(self.pads[i] for i in indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.ragged is None:
            super().batch_repeat_interleave(repeats)
        else:
            index = torch.arange(self.ragged.num_seqs).repeat_interleave(repeats)
            self.batch_select_indices(index)

    def reset(self) -> None:
        """Empty; ready for another prompt."""
        layers: list[Any] = self.layers
        for layer in layers:  # Transformers 5.17 would keep tensors of zeros, and append to them
            layer.keys = layer.values = None
            layer.is_initialized = False
        super().reset()
        self._forget()

    def __copy__(self) -> None:
        """Refused: both would write to the same memory."""
        raise NotImplementedError("copy.copy: got a VLCache, expected copy.deepcopy")

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: all but the captured steps, which are of one block."""
        if self.is_in_step or self._compressor is not None:
            raise ValueError("VLCache: got one amid a forward pass, expected one between passes")
        return {**vars(self), "graphs": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        layers: list[Any] = self.layers
        for layer in layers:
            layer.belong_to(self, layer.index)
        if self.ragged is not None:
            self.ragged.backend = get_backend(self.backend_name, self.ragged.k.device)

    def activate_past_recording(self) -> None:
        """Refused: compression cannot be rolled back."""
        raise NotImplementedError("VLCache: got assisted decoding, expected plain decoding")

    def _make_report(
        self, plan: CompressionPlan, bytes_before: int, bytes_allocated: int
    ) -> CompressionReport:
        dense_rows = plan.keep.numel() * plan.prompt.padded_length
        return CompressionReport(
            budget=self.config.budget,
            layers=[i for i, layer in enumerate(self.layers) if isinstance(layer, VLCacheLayer)],
            sparsity=[[None if isnan(x) else x for x in row] for row in plan.sparsity.tolist()],
            kept=plan.keep.tolist(),
            lengths=list(plan.prompt.lengths),
            bytes_before=bytes_before,
            bytes_after=bytes_before * int(plan.keep.sum()) // dense_rows,
            bytes_allocated=bytes_allocated,
        )
