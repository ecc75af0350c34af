"""What the environment chooses: SGLang passes plugins no arguments of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast, get_args

from vlcache_triton.ops import BackendName
from vlcache_triton.recipe.config import VLCacheConfig
from vlcache_triton.recipe.profile import HeadHits, HeadProfile, read_profile

PREFIX = "VLCACHE_"
PRESETS: dict[str, Callable[[], VLCacheConfig]] = {
    "paper": VLCacheConfig,
    "tuned": VLCacheConfig.tuned,
}


@dataclass(frozen=True)
class Settings:
    """The choices of a server.

    config: of the compression, from VLCACHE_PRESET (paper or tuned, as VLCacheConfig has them),
        VLCACHE_CONFIG (one JSON object with fields of VLCacheConfig), and VLCACHE_BUDGET,
        VLCACHE_THRESHOLD, ... (one field each); the later ones win.
    kernels: VLCACHE_KERNELS, as get_backend takes it.
    profile: the file of VLCACHE_PROFILE (`vlcache calibrate`, or SparseMM's), by which layers share
        the budget; the heads of a layer keep as many tokens each.
    """

    config: VLCacheConfig = VLCacheConfig()  # noqa: RUF009 (frozen)
    kernels: BackendName = "auto"
    profile: HeadProfile | HeadHits | None = None

    def describe(self) -> str:
        """One line for the server's log."""
        config = self.config
        if config.is_lossless:
            return "vlcache: on, budget 1.0: every prompt keeps its whole KV cache."
        share = (
            f"{config.budget} tokens a layer"
            if isinstance(config.budget, int)
            else f"{config.budget:.0%} of the prompt's KV cache"
        )
        whose = "prompts with an image keep" if config.text_window is None else "prompts keep"
        changed = [
            f"{field.name}={getattr(config, field.name)!r}"
            for field in fields(config)
            if field.name != "budget" and getattr(config, field.name) != field.default
        ]
        changed += ["layers by a profile"] * (self.profile is not None)
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
    known = {*names, PREFIX + "PRESET", PREFIX + "CONFIG", PREFIX + "KERNELS", PREFIX + "PROFILE"}
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise ValueError(f"{unknown[0]}: got a variable of that name, expected {sorted(known)}")
    config = PRESETS[_word(environ, PREFIX + "PRESET", "paper", tuple(PRESETS))]()
    if (text := environ.get(PREFIX + "CONFIG")) is not None:
        config = _replaced(config, PREFIX + "CONFIG", _json_fields(text))
    for name, field in names.items():
        if (text := environ.get(name)) is not None:
            config = _replaced(config, name, {field: _scalar(text)})
    _check_supported(config)
    kernels = _word(environ, PREFIX + "KERNELS", "auto", get_args(BackendName))
    return Settings(config, cast(BackendName, kernels), _profile(environ))


def _profile(environ: Mapping[str, str]) -> HeadProfile | HeadHits | None:
    name = PREFIX + "PROFILE"
    if (path := environ.get(name)) is None:
        return None
    try:
        return read_profile(path)
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _word(environ: Mapping[str, str], name: str, default: str, words: tuple[str, ...]) -> str:
    word = environ.get(name, default)
    if word not in words:
        raise ValueError(f"{name}: got {word!r}, expected one of {words}")
    return word


def _check_supported(config: VLCacheConfig) -> None:
    """Refuse what a prompt in chunks cannot be measured by: sums over rows add up where the heads'
    are averaged, and maxima where the heads' are maxima, but not a mean of maxima; and what a pool
    that is sized before sparsities are known cannot hold: layers have to add up to the budget."""
    if config.clipping != "exact":
        raise NotImplementedError(
            f"{PREFIX}CLIPPING: got {config.clipping!r}, expected 'exact' in SGLang"
        )
    if config.is_fp8:
        raise NotImplementedError(
            f"{PREFIX}KV_CACHE_DTYPE: got {config.kv_cache_dtype!r}, expected 'auto' in SGLang"
        )
    group = "mean" if config.row_reduction == "sum" else "max"
    if config.group_reduction != group:
        raise NotImplementedError(
            f"{PREFIX}GROUP_REDUCTION: got {config.group_reduction!r} with"
            f" {PREFIX}ROW_REDUCTION={config.row_reduction}, expected {group!r} in SGLang"
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


def _replaced(config: VLCacheConfig, variable: str, chosen: dict[str, Any]) -> VLCacheConfig:
    try:
        return replace(config, **chosen)
    except ValueError as error:
        raise ValueError(f"{variable}: {error}") from error
