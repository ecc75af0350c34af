"""What the commands share in talking to the user: errors, progress, numbers, bars, JSON.

All that a user can put right is a UserError, whoever notices.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

BAR_WIDTH = 16
MAX_LINE = 300  # characters


class UserError(Exception):
    """Something the user can put right. Its text is the one line that is shown."""


@contextmanager
def files(option: str, verb: str, path: Path) -> Iterator[None]:
    """What cannot be read or written is for the user to put right."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{option}: cannot {verb} {str(path)!r}: {reason}") from error


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar of `total` steps on stderr that goes when done; each call of what is given is one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    task = bar.add_task(description, total=total)
    with bar if console.is_terminal else nullcontext():  # a bar is for a reader who waits
        yield partial(bar.advance, task)


def waiting(description: str) -> AbstractContextManager:
    """A spinner on stderr, for what takes a while and cannot be counted."""
    console = Console(stderr=True)
    return console.status(description) if console.is_terminal else nullcontext()


def right(heading: str) -> Column:
    """A table's column of numbers."""
    return Column(heading, justify="right")


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


def count(number: int, noun: str) -> str:
    """'1 form', '2 forms'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_line(text: str) -> str:
    """The first line that says something, cut where it is very long."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return first if len(first) <= MAX_LINE else first[: MAX_LINE - 1] + "…"
