"""The one table that hooks and backend share: a process has one scheduler and one model."""

from __future__ import annotations

from .prompts import PromptTable

#: None until a server's attention backend is vlcache; then hooks have something to do.
_table: PromptTable | None = None


def table() -> PromptTable | None:
    """The prompts under compression, None where vlcache is not the attention backend."""
    return _table


def set_table(prompts: PromptTable) -> None:
    """Called once, when the attention backend is made."""
    global _table
    _table = prompts
