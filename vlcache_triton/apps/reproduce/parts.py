"""A folder of finished parts: a JSON file each, made once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Parts:
    """What has been measured so far. A run that was cut off goes on from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Where a part is, or will be."""
        return self.folder / f"{name}.json"

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The part of this name as its file has it: found there, or measured and written now.

        A file is there whole or not at all.
        """
        path = self.path(name)
        if not path.exists():
            part = measure()
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")
            unfinished.write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")
            os.replace(unfinished, path)
        return json.loads(path.read_text(encoding="utf-8"))
