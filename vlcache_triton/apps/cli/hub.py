"""Whether the hub has a model: asked once, for from_pretrained would retry for minutes."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from .console import UserError, one_line


def check_exists(source: str) -> None:
    """See that a model is a folder, has been downloaded, or can be; say what failed of it."""
    if Path(source).is_dir():
        return
    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(source, "config.json"), str):
            url = huggingface_hub.hf_hub_url(source, "config.json")
            huggingface_hub.get_hf_file_metadata(url)
    except Exception as error:  # the hub's HTTP client, and so its errors, differ by version
        raise UserError(f"model: got {source!r}, {_reason(source, error)}") from error


def _reason(source: str, error: Exception) -> str:
    if isinstance(error, HFValidationError):
        return "which is no folder, and no name that a model of the hub can have"
    if isinstance(error, OfflineModeIsEnabled):
        return "which is no folder and not downloaded yet; the hub is not asked (HF_HUB_OFFLINE)"
    if isinstance(error, GatedRepoError):
        return (
            f"which is gated: ask for access at {huggingface_hub.constants.ENDPOINT}/{source},"
            " then log in (hf auth login)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return "which is no folder, and unknown to the hub (a private one: hf auth login)"
    if isinstance(error, EntryNotFoundError):
        return "which has no config.json on the hub, expected a model of Transformers"
    if isinstance(error, HfHubHTTPError):
        return f"for which the hub answered with an error: {one_line(str(error))}"
    return (
        "which is no folder, and the hub cannot be reached to look for it; is there a network?"
        f" ({type(error).__name__}: {one_line(str(error))})"
    )
