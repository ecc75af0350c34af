"""The folder of a command that goes on from what it finds there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .console import UserError, files

SETTINGS = "settings.json"


def check_folder(out: Path, settings: dict[str, Any], results: str) -> None:
    """See that what the folder holds was measured in the same way.

    Args:
        results: a pattern of files; where none of them says anything, nothing was measured.
    """
    try:
        with files("out", "read", out):
            if not any(x.stat().st_size for x in out.glob(results) if x.name != SETTINGS):
                return
            found = json.loads((out / SETTINGS).read_text())
    except ValueError as error:
        raise UserError(f"out: {str(out / SETTINGS)!r} holds no JSON: {error}") from error
    expected = json.loads(json.dumps(settings))  # of tuples lists
    if found != expected:
        raise UserError(f"out: {str(out)!r} holds results of {found}, expected {expected}")


def make_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, and say in it what its results will be of."""
    with files("out", "write", out):
        out.mkdir(parents=True, exist_ok=True)
        (out / SETTINGS).write_text(json.dumps(settings) + "\n")
