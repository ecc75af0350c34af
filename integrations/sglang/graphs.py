"""Captured decode steps of a few widths: short requests do not pay for the context length.

The grid of a captured step, its table and the splits of its attention are fixed, so a graph that
serves the whole context launches work for it in every step. SGLang can capture several graphs of
each batch size, and asks before a replay which of them it should be.
"""

from __future__ import annotations

from typing import Any

from .prompts import PromptTable

NARROWEST = 2048  # live tokens of a request
STEP = 8  # how much wider the next one is


def graph_widths(max_context: int) -> tuple[int, ...]:
    """Ascending; the last is max_context, and those before it at most a quarter of it."""
    widths, width = [], NARROWEST
    while 4 * width <= max_context:
        widths.append(width)
        width *= STEP
    return (*widths, max_context)


class LiveWidths:
    """SGLang's AttentionGraphVariants: a label for each width, chosen by the longest live length.

    capture_labels: the widest first, so that the others are captured in memory that it used.
    """

    def __init__(self, table: PromptTable) -> None:
        self._table = table
        self._widths = {f"live-{width}": width for width in table.graph_widths}
        self.capture_labels = tuple(reversed(self._widths))

    def select(self, forward_batch: Any) -> str:
        """The narrowest that holds the step to come."""
        longest = self._table.longest_live
        for label, width in self._widths.items():
            if longest is not None and longest <= width:
                return label
        return self.capture_labels[0]


def width_of(label: str | None, table: PromptTable) -> int:
    """The width that is being captured under a label; the widest where there is none."""
    return table.graph_widths[-1] if label is None else int(label.removeprefix("live-"))
