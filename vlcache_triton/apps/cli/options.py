"""The options that several commands have, and the configuration that they choose together."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlcache_triton import VLCacheConfig

from .console import UserError

if TYPE_CHECKING:
    from vlcache_triton.recipe.policies import Policy


class PolicyName(str, Enum):
    """The names of vlcache_triton.recipe.policies.POLICIES, which take torch to import."""

    vl_cache = "vl_cache"
    random = "random"
    streaming_llm = "streaming_llm"
    h2o = "h2o"
    snapkv = "snapkv"
    pyramidkv = "pyramidkv"
    adakv = "adakv"
    defensivekv = "defensivekv"
    defensivekv_all = "defensivekv_all"
    keydiff = "keydiff"
    mixkv = "mixkv"
    aircache = "aircache"
    tgv_kv = "tgv_kv"
    query_agnostic = "query_agnostic"
    full = "full"

    def load(self) -> Policy:
        """The policy itself."""
        from vlcache_triton.recipe.policies import POLICIES

        return next(policy for policy in POLICIES if policy.name == self.value)


class Preset(str, Enum):
    """The classmethods of VLCacheConfig that make one for a budget; the paper's is the class."""

    paper = "paper"
    tuned = "tuned"


#: Budgets down to which form-reader keeps nearly all its answers: formreader/weights/PROVENANCE.md.
FORM_READER_BUDGETS = {Preset.paper: 0.6, Preset.tuned: 0.1}


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _choice(text: str, names: type[Enum]) -> str:
    return f"{text}: {', '.join(name.value for name in names)}."


ImageOption = Annotated[
    list[Path],
    typer.Option(metavar="FILE", help="An image; give the option again for more."),
]
PromptOption = Annotated[str, typer.Option(metavar="TEXT", help="What to ask about the images.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="A model of the hub, or its folder.", show_default="form-reader"
    ),
]
BudgetOption = Annotated[
    float,
    typer.Option(metavar="SHARE", help="Share of the KV cache to keep, in (0, 1]."),
]
PolicyOption = Annotated[
    PolicyName, typer.Option(metavar="NAME", help=_choice("What is kept", PolicyName))
]
PRESET_HELP = (
    "paper: VL-Cache as published; tuned: what answered best with form-reader, with a row that"
    " stands for all that is evicted."
)
PresetOption = Annotated[Preset, typer.Option(metavar="NAME", help=PRESET_HELP)]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="cpu, cuda, or cuda:1 and so on.", show_default="cuda, else cpu"
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        metavar="NAME",
        help=_choice("Of the model", Dtype) + " auto is the checkpoint's own on a GPU, and float32"
        " on a CPU and for form-reader.",
    ),
]
StreamingOption = Annotated[
    bool,
    typer.Option(
        "--streaming",
        help="Compress during prefill: the full cache never exists at once. For budgets below 0.5:"
        " above, it takes more memory than the full cache.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def checked_names(option: str, chosen: Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    """What is chosen, if it is known; without a choice, all that is."""
    for name in chosen or ():
        if name not in known:
            raise UserError(f"{option}: got {name!r}, expected one of {tuple(known)}")
    return chosen or known


def checked_config(
    budget: float,
    preset: Preset = Preset.paper,
    policy: PolicyName = PolicyName.vl_cache,
    streaming: bool = False,
) -> VLCacheConfig:
    """What the options choose, checked before anything slow is done."""
    if policy is not PolicyName.vl_cache:
        if preset is not Preset.paper:
            raise UserError(
                f"preset: got {preset.value!r} with the policy {policy.value!r}, expected it with"
                " vl_cache alone"
            )
        if streaming:
            raise UserError(
                f"streaming: got it with the policy {policy.value!r}, expected it with vl_cache"
                " alone"
            )
    configure = VLCacheConfig.tuned if preset is Preset.tuned else VLCacheConfig
    try:
        return configure(budget=budget)
    except ValueError as error:
        raise UserError(f"budget: got {budget:g}, expected a share in (0, 1]") from error
