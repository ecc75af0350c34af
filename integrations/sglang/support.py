"""What `--attention-backend vlcache` refuses, at start and with a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

SGLANG_VERSION = "0.5.23"  # whose internals the hooks were written for
OTHER_CACHES = (  # flags that keep KV in a place of its own
    "enable_hierarchical_cache",
    "enable_hisparse",
    "enable_lmcache",
    "enable_flexkv",
    "enable_unified_memory",
    "enable_page_major_kv_layout",
    "enable_unified_cache_external_linker",
    "enable_session_radix_cache",
    "radix_cache_backend",
)
BY_SLOT = (  # flags that look up by slot, when a request ends, what each of its tokens recorded
    "enable_return_routed_experts",
    "enable_return_indexer_topk",
)
SINKS = ("sinks", "attention_sink_bias")  # what layers call them
OTHER_DECODES = ("enable_nvidia_megakernel", "enable_amd_monokernel")  # attend by themselves


def check_version() -> None:
    """Raise RuntimeError for any other SGLang."""
    installed = version("sglang")
    if installed != SGLANG_VERSION:
        raise RuntimeError(
            f"--attention-backend vlcache: got sglang {installed}, expected {SGLANG_VERSION}:"
            " it hooks into the scheduler, whose seats move between versions"
        )


def check_server(runner: Any) -> None:
    """Raise NotImplementedError if this server runs something that vlcache does not support.

    Args:
        runner: SGLang's ModelRunner, its model loaded.
    """
    problems = [*_server_problems(runner), *_model_problems(runner)]
    if problems:
        raise NotImplementedError("--attention-backend vlcache: " + "; ".join(problems))


def _server_problems(runner: Any) -> Iterator[str]:
    from sglang.srt.runtime_context import (
        attention_backends,
        get_disagg,
        get_exec,
        get_memory,
        get_observability,
        get_parallel,
        get_schedule,
        get_serving,
        get_spec,
    )

    if set(attention_backends()) != {"vlcache"}:
        yield f"got prefill and decode backends {attention_backends()}, expected vlcache for both"
    if get_spec().speculative_algorithm is not None:
        yield "speculative decoding is not supported, as it verifies several tokens at once"
    if runner.page_size != 1:
        yield f"got --page-size {runner.page_size}, expected 1: slots are freed one by one"
    if get_schedule().enable_mixed_chunk:
        yield "--enable-mixed-chunk is not supported"
    for flags, part, why in (
        (OTHER_CACHES, get_memory(), "keeps KV in a place of its own"),
        (BY_SLOT, get_exec().features, "reads by slot, and evicted tokens have none"),
        (OTHER_DECODES, get_exec().kernel, "decodes without an attention backend"),
        (("enable_torch_compile",), get_exec().graph, "would trace tables made by the host"),
        (("prefill_only_disable_kv_cache",), get_schedule(), "stores no KV that could be measured"),
    ):
        for flag in flags:
            if getattr(part, flag):
                yield f"--{flag.replace('_', '-')} is not supported, as it {why}"
    if get_observability().kv_canary != "none":
        yield "--kv-canary is not supported, as it checks KV in the slots that packing rewrites"
    if get_disagg().disaggregation_mode != "null":
        yield "prefill-decode disaggregation is not supported"
    if get_disagg().enable_pdmux:
        yield "--enable-pdmux is not supported"
    if get_exec().overlap.enable_two_batch_overlap:
        yield "--enable-two-batch-overlap is not supported"
    if get_exec().dllm.dllm_algorithm is not None:
        yield "diffusion language models are not supported"
    if get_exec().graph.cuda_graph_config.prefill.backend == "full":
        yield "full prefill CUDA graphs are not supported (breakable ones are)"
    if get_serving().strip_thinking_cache:
        yield "--strip-thinking-cache is not supported"
    parallel = get_parallel()
    for name in ("pp_size", "attn_cp_size", "attn_dcp_size", "attn_dp_size"):
        if getattr(parallel, name) != 1:
            yield f"got {name} {getattr(parallel, name)}, expected 1"


def _model_problems(runner: Any) -> Iterator[str]:
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    config = runner.model_config
    if config.attention_arch != AttentionArch.MHA:
        yield f"got {config.attention_arch.name} attention, expected MHA, MQA or GQA (no MLA)"
    if config.is_encoder_decoder:
        yield "encoder-decoder models are not supported"
    if runner.kv_cache_dtype != runner.dtype:
        yield f"got a KV cache of {runner.kv_cache_dtype}, expected the model's {runner.dtype}"
    layers = [m for m in runner.model.modules() if isinstance(m, RadixAttention)]
    every = range(config.num_hidden_layers)  # but those that keep a state, and no KV
    expected = list(getattr(runner.token_to_kv_pool, "full_attention_layer_id_mapping", every))
    ids = sorted(layer.layer_id for layer in layers)
    if ids != expected:
        yield f"got attention layers {ids}, expected {expected}"
    checks = (
        ("sliding-window attention", lambda x: x.sliding_window_size > -1),
        ("cross-attention", lambda x: x.is_cross_attention),
        ("attention that is not causal", lambda x: x.attn_type != AttentionType.DECODER),
        ("capped logits", lambda x: x.logit_cap > 0),
        ("scaled KV", lambda x: x.k_scale is not None or x.v_scale is not None),
        ("temperature by length", lambda x: x.xai_temperature_len > 0),
        ("V heads of another size", lambda x: x.v_head_dim != x.qk_head_dim),
    )
    for what, is_so in checks:
        ids = [layer.layer_id for layer in layers if is_so(layer)]
        if ids:
            yield f"{what} (layers {ids}) is not supported"
    if any(getattr(m, x, None) is not None for m in runner.model.modules() for x in SINKS):
        yield "attention with sinks is not supported"
