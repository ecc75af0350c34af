"""What is not supported is refused here, by name, before any work: by NotImplementedError, or by
ValueError where the caller can give something else."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, __version__
from transformers.generation.configuration_utils import GenerationMode

from vlcache_triton import VLCacheConfig
from vlcache_triton.kernels.checks import FP8_CAPABILITY
from vlcache_triton.ops import Backend
from vlcache_triton.recipe.policies import VL_CACHE, Policy
from vlcache_triton.recipe.prompt import left_pads

from .names import CACHE

SUPPORTED_VERSIONS = ">=5.17,<5.25"  # of Transformers: what pyproject.toml asks for, and CI tests
# Of a text configuration: models that differ in them cannot share a cache.
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
WINDOW_TYPES = ("sliding_attention", "chunked_attention")
# With a state of constant size; "moe" and "mlp", which some models count as layers, with none.
STATE_TYPES = ("linear_attention", "conv", "moe", "mlp")
LAYER_TYPES = ("full_attention", *WINDOW_TYPES, *STATE_TYPES)
GENERATION_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
# What the lean loop does not do, and what asks for nothing besides None.
NOT_LEAN: dict[str, Any] = {
    "streamer": None,
    "custom_generate": None,
    "output_scores": False,
    "return_dict_in_generate": False,
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "watermarking_config": None,
    "max_time": None,
    "stop_strings": None,
}
# Why a family cannot be served, where its configuration alone does not say so.
REFUSED_FAMILIES = {
    "paligemma": "its text rows attend bidirectionally over the prompt",
    "diffusion_gemma": "it generates whole blocks by diffusion",
    "gemma3n": "its layers share each other's KV cache",
    "mllama": "it sees images by cross-attention, so there are no visual tokens to compress",
}


@functools.cache
def warn_of_version() -> None:
    """Say, once, that nobody has tested the Transformers that is installed."""
    if not SpecifierSet(SUPPORTED_VERSIONS).contains(__version__, prereleases=True):
        warnings.warn(
            f"vl_cache: got Transformers {__version__}, expected {SUPPORTED_VERSIONS}, which its"
            " tests pass on; going on all the same",
            stacklevel=4,  # whoever enters the block
        )


def unobserved(model: PreTrainedModel) -> RuntimeError:
    """The error for a prompt whose attention nobody has seen: the worst bug, were it silent."""
    return RuntimeError(
        f"{type(model).__name__}: its prompt was read, but not compressed; its attention does not"
        f" reach vl_cache. Transformers {__version__} is installed, {SUPPORTED_VERSIONS} is"
        " supported; if yours is, please report this"
    )


def layer_types(text_config: PreTrainedConfig) -> list[str]:
    """The attention type of each layer of the language model, all full or kept as they are."""
    types = getattr(text_config, "layer_types", None)
    if types is None:
        if getattr(text_config, "sliding_window", None) is not None:
            types = ["sliding_attention"] * text_config.num_hidden_layers
        elif getattr(text_config, "attention_chunk_size", None) is not None:
            types = ["chunked_attention"] * text_config.num_hidden_layers
        else:
            types = ["full_attention"] * text_config.num_hidden_layers
    for layer_type in types:
        if layer_type not in LAYER_TYPES:
            raise NotImplementedError(
                f"model: got a layer of type {layer_type!r}, expected one of {LAYER_TYPES}"
            )
    return list(types)


def window_of(text_config: PreTrainedConfig) -> tuple[int, bool]:
    """(tokens that layers with a window see, whether these are chunks); (0, False) without."""
    types = set(layer_types(text_config)) & set(WINDOW_TYPES)
    if len(types) > 1:
        raise NotImplementedError(f"model: got layers of types {sorted(types)}, expected one kind")
    if not types:
        return 0, False
    is_chunked = types == {"chunked_attention"}
    return (
        text_config.attention_chunk_size if is_chunked else text_config.sliding_window,
        is_chunked,
    )


def describe_model(config: PreTrainedConfig) -> str:
    """Which model a cache is of: its type, the last part of its name, its text model's sizes."""
    name = str(getattr(config, "name_or_path", None) or "").rstrip("/").split("/")[-1]
    text_config = config.get_text_config(decoder=True)
    sizes = ", ".join(f"{size}={_of_a_layer(text_config, size)}" for size in SIZES)
    return f"{config.model_type} {name!r} ({sizes})"


def check_choices(config: Any, policy: Any, streaming: bool) -> None:
    """Refuse what is not a configuration or a policy, and policies that cannot stream."""
    if not isinstance(config, VLCacheConfig):
        raise ValueError(
            f"config: got {config!r}, expected a VLCacheConfig (a share goes by its name:"
            " budget=0.1)"
        )
    if not isinstance(policy, Policy):
        raise ValueError(
            f"policy: got {policy!r}, expected a Policy, such as"
            " vlcache_triton.recipe.policies.snapkv()"
        )
    if streaming and policy is not VL_CACHE:
        raise NotImplementedError(
            f"streaming: got True with the policy {policy.name!r}, expected it with VL-Cache's"
        )


def check_fp8(config: VLCacheConfig, backend: Backend, device: torch.device) -> None:
    """Refuse fp8 where the kernels cannot convert it, or do it wrongly."""
    if not config.is_fp8 or backend.name != "triton":
        return
    if device.type != "cuda":
        raise NotImplementedError(
            f"kv_cache_dtype: got {config.kv_cache_dtype!r} in Triton's interpreter, which rounds"
            " it wrongly, expected backend='reference' on the CPU"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise NotImplementedError(
            f"kv_cache_dtype: got {config.kv_cache_dtype!r} on a GPU of compute capability"
            f" {capability}, expected {FP8_CAPABILITY} at least"
        )


def check_made_for(policy: Policy, model_config: PreTrainedConfig) -> None:
    """Refuse a policy that is for another model."""
    model = describe_model(model_config)
    if policy.made_for not in (None, model):
        raise ValueError(f"policy: got one made for {policy.made_for}, expected one for {model}")


def check_kind(model: Any) -> None:
    """Refuse what is no plain model of Transformers, naming the one within."""
    expected = None
    if hasattr(model, "get_base_model"):
        expected = "its get_base_model(), which runs the adapter as well"
    elif hasattr(model, "_orig_mod"):
        expected = "the model that was compiled, its _orig_mod"
    elif not (isinstance(model, PreTrainedModel) and model.can_generate()):
        expected = "one that can generate"
    elif (
        getattr(model, "_compiled_call_impl", None) is not None
        or hasattr(model.forward, "_torchdynamo_orig_callable")  # model.forward = torch.compile()
    ):
        expected = "one that is not compiled"
    elif model.training:
        expected = "one in evaluation mode: model.eval()"
    if expected is not None:
        raise ValueError(f"model: got {type(model).__name__}, expected {expected}")


def check_config(config: PreTrainedConfig) -> None:
    """Refuse models on which VL-Cache is not defined, as far as their configuration tells."""
    text_config = config.get_text_config(decoder=True)
    for model_type in (config.model_type, text_config.model_type):
        for family, reason in REFUSED_FAMILIES.items():
            if model_type.startswith(family):
                raise _unsupported(config, reason)
    if config.is_encoder_decoder:
        raise _unsupported(config, "it is an encoder-decoder model")
    if _of_a_layer(text_config, "num_kv_shared_layers"):
        raise _unsupported(config, "its layers share each other's KV cache")
    if _of_a_layer(text_config, "kv_lora_rank"):
        raise _unsupported(config, "its cache is latent (MLA)")
    if getattr(text_config, "cross_attention_layers", None):
        raise _unsupported(config, "it has cross-attention layers")
    if "full_attention" not in layer_types(text_config):
        raise _unsupported(config, "it has no full-attention layer")


def _of_a_layer(config: PreTrainedConfig, name: str) -> Any:
    """An attribute of a configuration; where it is each layer's own, of one that has it."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # of Transformers' heterogeneous configurations: ambiguous
        layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
        return next((x for x in (getattr(layer, name, None) for layer in layers) if x), None)


def check_model(model: PreTrainedModel) -> None:
    """Refuse models on which VL-Cache is not defined, saying why."""
    check_config(model.config)
    text_model = text_model_of(model)
    if not text_model._can_set_attn_implementation():
        raise _unsupported(model.config, "its attention does not go through AttentionInterface")
    for module in text_model.modules():
        if hasattr(module, "layer_idx") and getattr(module, "is_causal", True) is False:
            raise _unsupported(model.config, "its text rows are not causal")


def check_generate(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Refuse what `generate` cannot do on a compressed cache, by its arguments."""
    choice = functools.partial(_choice, model, kwargs)
    assisted = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")
    for name in (*assisted, "prefill_chunk_size"):
        if choice(name) is not None:
            raise NotImplementedError(f"{name}: got {choice(name)!r}, expected None with vl_cache")
    # "hybrid" stands in old checkpoints of models with windows; Transformers itself drops it.
    if choice("cache_implementation") not in (None, "hybrid"):
        raise NotImplementedError(
            f"cache_implementation: got {choice('cache_implementation')!r}, expected None"
            " (vl_cache brings its own)"
        )
    if choice("use_cache") is False:
        raise NotImplementedError("use_cache: got False, expected True with vl_cache")
    if choice("output_attentions"):
        raise NotImplementedError(
            "output_attentions: got True, expected False (the attention matrix is never made)"
        )
    if kwargs.get("inputs_embeds") is not None and kwargs.get("input_ids") is None:
        raise NotImplementedError(
            "inputs_embeds: got embeddings alone, expected input_ids, which show where images lie"
        )
    mask = kwargs.get("attention_mask")
    # Behind what is in a cache, a turn may have pads of its own, which its pass looks at.
    is_first = kwargs.get(CACHE) is None or kwargs[CACHE].get_seq_length() == 0
    if isinstance(mask, Tensor) and mask.ndim == 2 and is_first:
        left_pads(mask)


def check_lean(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Refuse what session.generate's lean loop does not do."""
    for name, nothing in NOT_LEAN.items():
        value = _choice(model, kwargs, name)
        if value is not None and value != nothing:
            raise NotImplementedError(
                f"{name}: got {value!r}, expected {nothing!r} with session.generate"
                " (model.generate has it)"
            )


def _choice(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """An argument of generate, else of its generation_config, else the model's default."""
    for source in (kwargs.get("generation_config"), model.generation_config):
        if kwargs.get(name) is None and getattr(source, name, None) is not None:
            return getattr(source, name)
    return kwargs.get(name)


def check_mode(mode: GenerationMode) -> None:
    """Refuse generation modes that roll the cache back or run several models."""
    if mode not in GENERATION_MODES:
        raise NotImplementedError(
            f"generate: got the mode {mode.value!r}, expected one of"
            f" {[m.value for m in GENERATION_MODES]} with vl_cache"
        )


def text_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """The smallest submodel whose configuration is the text configuration."""
    text_config = model.config.get_text_config(decoder=True)
    owners = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module.config is text_config
    ]
    if not owners:
        raise _unsupported(model.config, "its language model cannot be found")
    return owners[-1]


def models_of(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model and those within it that run its language model, outermost first: any of them may
    be the one that is called."""
    text_model = text_model_of(model)
    return [
        x
        for x in model.modules()
        if isinstance(x, PreTrainedModel) and any(y is text_model for y in x.modules())
    ]


def _unsupported(config: PreTrainedConfig, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"model: got one of type {config.model_type!r}, which VL-Cache does not support: {reason}"
    )
