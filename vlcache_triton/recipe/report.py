"""What compression did to one batch of prompts, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan

from .plan import CompressionPlan


@dataclass(frozen=True)
class CompressionReport:
    """The outcome of a prefill, and of later turns with images, as of the latest.

    budget: as configured.
    layers: the model's indices of the compressed layers; the rows of the next two.
    sparsity: `[num_layers][num_seqs]`, γ' (eq. 2) of what was compressed last; None for a sequence
        that was left whole.
    kept: `[num_layers][num_seqs]`, rows that each KV head keeps: tokens, answers among them, and
        the one for the evicted where there is one. The mean, rounded down, where heads keep
        different numbers.
    lengths: `[num_seqs]`, tokens read until then, pads not counted.
    bytes_before: K and V of these layers, as a dense cache stores them.
    bytes_after: K and V of the kept rows.
    bytes_allocated: of the compressed cache right after compression, with its head room for
        tokens to come.
    segments: the prompt, and the later turns that were compressed.
    """

    budget: float | int
    layers: list[int]
    sparsity: list[list[float | None]]
    kept: list[list[int]]
    lengths: list[int]
    bytes_before: int
    bytes_after: int
    bytes_allocated: int
    segments: int = 1

    @classmethod
    def of(
        cls,
        plan: CompressionPlan,
        budget: float | int,
        layers: Sequence[int],
        bytes_before: int,
        bytes_allocated: int,
        row_nbytes: int,
    ) -> CompressionReport:
        """Of what a plan keeps, in rows of so many bytes, K and V; the other arguments are fields
        of the same name."""
        return cls(
            budget=budget,
            layers=list(layers),
            sparsity=sparsity_of(plan),
            kept=plan.keep.tolist(),
            lengths=list(plan.prompt.lengths),
            bytes_before=bytes_before,
            bytes_after=int(plan.head_keep.sum()) * row_nbytes,
            bytes_allocated=bytes_allocated,
        )

    def to_dict(self) -> dict:
        """Ready for JSON."""
        return asdict(self)


def sparsity_of(plan: CompressionPlan) -> list[list[float | None]]:
    """Of a plan, as reports have it."""
    return [[None if isnan(x) else x for x in row] for row in plan.sparsity.tolist()]
