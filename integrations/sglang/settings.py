"""What the environment chooses: SGLang passes plugins no arguments of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast, get_args

from vlcache_triton.ops import BackendName
from vlcache_triton.recipe.config import VLCacheConfig

PREFIX = "VLCACHE_"


@dataclass(frozen=True)
class Settings:
    """The choices of a server.

    config: of the compression, from VLCACHE_CONFIG (one JSON object with fields of VLCacheConfig)
        and VLCACHE_BUDGET, VLCACHE_THRESHOLD, ... (one field each; these win).
    kernels: VLCACHE_KERNELS, as get_backend takes it.
    """

    config: VLCacheConfig = VLCacheConfig()  # noqa: RUF009 (frozen)
    kernels: BackendName = "auto"

    def describe(self) -> str:
        """One line for the server's log."""
        config = self.config
        if config.is_lossless:
            return "vlcache: on, budget 1.0: every prompt keeps its whole KV cache."
        share = (
            f"{config.budget} tokens a layer"
            if isinstance(config.budget, int)
            else (f"{config.budget:.0%} of the prompt's KV cache")
        )
        whose = "prompts with an image keep" if config.text_window is None else "prompts keep"
        changed = [
            f"{field.name}={getattr(config, field.name)!r}"
            for field in fields(config)
            if field.name != "budget" and getattr(config, field.name) != field.default
        ]
        others = f" ({', '.join(changed)})" if changed else ""
        return (
            f"vlcache: on, {whose} {share}{others}; evicted slots return to the scheduler, and such"
            f" prompts are not put in the radix cache; kernels: {self.kernels}."
        )


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from the environment.

    Raises:
        ValueError: for a variable that begins with VLCACHE_ and is none of ours, and for a value
            that does not fit, by the variable's name.
        NotImplementedError: for a choice that is not served here.
    """
    names = {PREFIX + field.name.upper(): field.name for field in fields(VLCacheConfig)}
    known = {*names, PREFIX + "CONFIG", PREFIX + "KERNELS"}
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise ValueError(f"{unknown[0]}: got a variable of that name, expected {sorted(known)}")
    settings = Settings()
    if (text := environ.get(PREFIX + "CONFIG")) is not None:
        settings = replace(settings, config=_config(PREFIX + "CONFIG", _json_fields(text)))
    for name, field in names.items():
        if (text := environ.get(name)) is not None:
            chosen = {field: _scalar(text)}
            settings = replace(settings, config=_config(name, chosen, settings.config))
    _check_supported(settings.config)
    if (text := environ.get(PREFIX + "KERNELS")) is not None:
        if text not in get_args(BackendName):
            raise ValueError(
                f"{PREFIX}KERNELS: got {text!r}, expected one of {get_args(BackendName)}"
            )
        settings = replace(settings, kernels=cast(BackendName, text))
    return settings


def _check_supported(config: VLCacheConfig) -> None:
    """Refuse what the Transformers adapter alone can do: the statistics of a prompt's chunks are
    summed, which maxima cannot be, and the block table has no place for a row of its own."""
    for name in ("row_reduction", "group_reduction", "remainder"):
        value, default = getattr(config, name), getattr(VLCacheConfig(), name)
        if value != default:
            raise NotImplementedError(
                f"{PREFIX}{name.upper()}: got {value!r}, expected {default!r} in SGLang"
            )


def _json_fields(text: str) -> dict[str, Any]:
    try:
        chosen = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{PREFIX}CONFIG: got {text!r}, expected a JSON object") from error
    known = [field.name for field in fields(VLCacheConfig)]
    if not isinstance(chosen, dict) or not set(chosen) <= set(known):
        raise ValueError(
            f"{PREFIX}CONFIG: got {text!r}, expected a JSON object with any of {known}"
        )
    return chosen


def _scalar(text: str) -> Any:
    """A number, null, or else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text  # allocation and granularity are words; VLCacheConfig checks them


def _config(
    variable: str, chosen: dict[str, Any], start: VLCacheConfig | None = None
) -> VLCacheConfig:
    try:
        return replace(start or VLCacheConfig(), **chosen)
    except ValueError as error:
        raise ValueError(f"{variable}: {error}") from error
