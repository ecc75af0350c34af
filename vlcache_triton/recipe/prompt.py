"""Where the sequences of a prompt lie, and which of their rows are post-vision (the boundary)."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels.launch import to_device
from .config import VLCacheConfig
from .policies import VL_CACHE, Policy


@dataclass(frozen=True)
class Prompt:
    """A left-padded batch of prompts, as host integers: knowing it takes one sync, before prefill.

    padded_length: rows of every sequence, pads included.
    pads: left pads of each sequence.
    query_rows: τ, the post-vision rows of each sequence, its last ones; 0 for a sequence that is
        left whole.
    is_visual: `[num_seqs, padded_length]` bool on the device, for policies that look at it; None
        where that is not known.
    """

    padded_length: int
    pads: tuple[int, ...]
    query_rows: tuple[int, ...]
    is_visual: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, pads not counted (m)."""
        return tuple(self.padded_length - pad for pad in self.pads)

    @property
    def is_compressible(self) -> bool:
        """Whether any sequence has post-vision rows."""
        return any(self.query_rows)

    @property
    def spans(self) -> tuple[slice, ...]:
        """The flattened rows of each sequence, pads left out."""
        width = self.padded_length
        return tuple(slice(i * width + pad, (i + 1) * width) for i, pad in enumerate(self.pads))

    @property
    def visual_tokens(self) -> list[Tensor | None]:
        """`[length]` bool of each sequence, pads left out; None where it is not known."""
        if self.is_visual is None:
            return [None] * len(self.pads)
        return [row[pad:] for row, pad in zip(self.is_visual, self.pads, strict=True)]

    @property
    def segments(self) -> slice:
        """Which of the sequences that cu_seqlens names are prompts and not runs of pads."""
        return slice(1, None, 2) if any(self.pads) else slice(None)

    def cu_seqlens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cu_seqlens_q, cu_seqlens_k), int32, for `post_vision_stats` over flattened rows.

        Each run of pads is a sequence of its own without query rows, so that no kernel needs to
        know of padding. A batch without any pad has just its prompts. Read only: they are shared.
        """
        return _cu_seqlens(self, device)

    def starts(self, device: torch.device) -> Tensor:
        """`[num_seqs + 1]` int32: the flattened row where each prompt's first real token lies."""
        return _rows(self, device)[0]

    def seqused(self, device: torch.device) -> Tensor:
        """`[num_seqs]` int32: tokens of each prompt, behind its start."""
        return _rows(self, device)[1]

    def pack_query_rows(self, q: Tensor) -> Tensor:
        """The post-vision rows of q `[num_seqs, num_heads, n, d]`, packed `[total_q, heads, d]`.

        q holds the last n rows of the prompts; a single prompt's rows are a view.
        """
        if len(self.query_rows) == 1:
            return q[0, :, q.shape[2] - self.query_rows[0] :].transpose(0, 1)
        rows = [q[i, :, q.shape[2] - n :].transpose(0, 1) for i, n in enumerate(self.query_rows)]
        return torch.cat(rows)


def read_prompt(
    is_visual: Tensor,
    attention_mask: Tensor | None,
    config: VLCacheConfig,
    policy: Policy = VL_CACHE,
) -> Prompt:
    """Find the modality boundary of each sequence, and how many query rows follow it.

    The post-vision rows are those after the *last* visual token; the last row alone where the
    image ends the prompt (τ = 0); the last `max_query_rows` of them at most. A prompt without an
    image has its last `text_window` rows, or none (recipe: "What the paper leaves open").

    Args:
        is_visual: `[num_seqs, padded_length]` bool, True on visual tokens.
        attention_mask: `[num_seqs, padded_length]`, nonzero on tokens, zero on left pads; None
            where nothing is padded.
        config: `max_query_rows` and `text_window` are used.
        policy: whose `query_rows` take the place of the post-vision rows, where there are any.

    Raises:
        ValueError: for right padding, for holes, and for a sequence without tokens.
    """
    num_seqs, padded_length = is_visual.shape
    if attention_mask is None:
        pads = [0] * num_seqs
    else:
        if attention_mask.shape != is_visual.shape:
            raise ValueError(
                f"attention_mask: got shape {tuple(attention_mask.shape)}, expected"
                f" {tuple(is_visual.shape)} (num_seqs, padded_length)"
            )
        pads = left_pads(attention_mask)
    boundaries = last_position(is_visual)
    query_rows = []
    for boundary, pad in zip(boundaries, pads, strict=True):
        rows = padded_length - boundary if boundary > 0 else config.text_window or 0
        rows = max(rows, 1) if boundary > 0 else min(rows, padded_length - pad)
        query_rows.append(count_query_rows(rows, padded_length - pad, config, policy))
    return Prompt(padded_length, tuple(pads), tuple(query_rows), is_visual)


def count_query_rows(post_vision: int, length: int, config: VLCacheConfig, policy: Policy) -> int:
    """How many of a prompt's last rows are measured, given its post-vision rows; 0 of 0."""
    rows = policy.query_rows(post_vision, length) if post_vision else 0
    return min(rows, config.max_query_rows or rows)


def left_pads(attention_mask: Tensor) -> list[int]:
    """The number of left pads of each sequence of a `[num_seqs, padded_length]` mask.

    Raises:
        ValueError: for right padding, for holes, and for a sequence without tokens.
    """
    mask = attention_mask != 0
    pads = (~mask).sum(1)
    position = torch.arange(mask.shape[1], device=mask.device)
    is_left = (mask == (position >= pads[:, None])).all(1)
    for i, (pad, ok) in enumerate(torch.stack([pads, is_left.long()], 1).tolist()):
        if not ok:
            raise ValueError(
                f"attention_mask: got zeros behind the first token of sequence {i}, expected"
                " left padding only (padding_side='left')"
            )
        if pad == mask.shape[1]:
            raise ValueError(f"attention_mask: got no token in sequence {i}, expected at least one")
    return pads.tolist()


def last_position(is_visual: Tensor) -> list[int]:
    """1 + the position of the last visual token of each sequence; 0 where there is none."""
    position = torch.arange(1, is_visual.shape[1] + 1, device=is_visual.device)
    return (is_visual * position).amax(1).tolist()


@functools.lru_cache(maxsize=4)  # every layer asks, and copying to a GPU waits for it
def _cu_seqlens(prompt: Prompt, device: torch.device) -> tuple[Tensor, Tensor]:
    if not any(prompt.pads):
        lengths_k, lengths_q = list(prompt.lengths), list(prompt.query_rows)
    else:
        pairs = zip(prompt.pads, prompt.lengths, strict=True)
        lengths_k = [n for pair in pairs for n in pair]
        lengths_q = [n for rows in prompt.query_rows for n in (0, rows)]
    return _cumulate(lengths_q, device), _cumulate(lengths_k, device)


@functools.lru_cache(maxsize=4)
def _rows(prompt: Prompt, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = [*(span.start for span in prompt.spans), len(prompt.pads) * prompt.padded_length]
    starts = torch.tensor(rows, dtype=torch.int32)
    lengths = torch.tensor(prompt.lengths, dtype=torch.int32)
    return to_device(starts, device), to_device(lengths, device)


def _cumulate(lengths: Iterable[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
