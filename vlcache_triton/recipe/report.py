"""What compression did to one batch of prompts, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class CompressionReport:
    """The outcome of one prefill.

    budget: as configured.
    layers: the model's indices of the compressed layers; the rows of the next two.
    sparsity: `[num_layers][num_seqs]`, γ' (eq. 2); None for a sequence that was left whole.
    kept: `[num_layers][num_seqs]`, rows that each KV head keeps: tokens, and the one for the
        evicted where there is one. The mean, rounded down, where heads keep different numbers.
    lengths: `[num_seqs]`, prompt tokens, pads not counted.
    bytes_before: K and V of these layers after prefill, as a dense cache stores them.
    bytes_after: K and V of the kept rows.
    bytes_allocated: of the compressed cache right after compression, with its head room for
        tokens to come.
    """

    budget: float | int
    layers: list[int]
    sparsity: list[list[float | None]]
    kept: list[list[int]]
    lengths: list[int]
    bytes_before: int
    bytes_after: int
    bytes_allocated: int

    def to_dict(self) -> dict:
        """Ready for JSON."""
        return asdict(self)
