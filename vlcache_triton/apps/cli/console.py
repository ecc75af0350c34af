"""What the commands share in talking to the user: errors, progress, numbers, bars, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

BAR_WIDTH = 16


class UserError(Exception):
    """Something the user can put right. Its text is the one line that is shown."""


@contextmanager
def progress(description: str, total: int) -> Iterator[Progress]:
    """A bar of `total` steps on stderr that goes when done; advance it by `advance(0)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    bar.add_task(description, total=total)
    if not console.is_terminal:  # a bar is for a reader who waits
        yield bar
        return
    with bar:
        yield bar


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """A spinner on stderr, for what takes a while and cannot be counted."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(description):
        yield


def print_json(value: Any) -> None:
    """To standard output, indented."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    print()


def bar(share: float) -> Text:
    """A bar for a share in [0, 1]."""
    filled = round(min(max(share, 0.0), 1.0) * BAR_WIDTH)
    return Text("█" * filled + "·" * (BAR_WIDTH - filled), style="cyan")


def size(num_bytes: float) -> str:
    """'1.3 MB': powers of ten, as disks count."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


def one_line(text: str, limit: int = 300) -> str:
    """The first line that says something, cut at `limit` characters."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return first if len(first) <= limit else first[: limit - 1] + "…"
