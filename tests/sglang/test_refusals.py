"""What is refused at start, with a sentence. Most against a stand-in, one through an engine."""

from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from engine import start
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import UnquantizedKVCacheMethod
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.plugins.hook_registry import HookRegistry
from tiny_checkpoints import save_qwen2_5_vl

from vlcache_triton.integrations.sglang import support
from vlcache_triton.integrations.sglang.backend import _refuse
from vlcache_triton.integrations.sglang.hooks import Hooks
from vlcache_triton.integrations.sglang.pool import OneTensorKVPool

CONTEXT = "sglang.srt.runtime_context."


def server(**changes) -> dict[str, object]:
    """What SGLang's runtime context says of a server that is supported, but for the changes."""
    parts = {
        "get_memory": dict.fromkeys(support.OTHER_CACHES, False),
        "get_spec": dict(speculative_algorithm=None),
        "get_schedule": dict(enable_mixed_chunk=False, prefill_only_disable_kv_cache=False),
        "get_observability": dict(kv_canary="none"),
        "get_disagg": dict(disaggregation_mode="null", enable_pdmux=False),
        "get_exec": dict(
            overlap=SimpleNamespace(enable_two_batch_overlap=False),
            dllm=SimpleNamespace(dllm_algorithm=None),
            graph=SimpleNamespace(
                cuda_graph_config=SimpleNamespace(prefill=SimpleNamespace(backend="breakable")),
                enable_torch_compile=False,
            ),
            features=SimpleNamespace(**dict.fromkeys(support.BY_SLOT, False)),
            kernel=SimpleNamespace(**dict.fromkeys(support.OTHER_DECODES, False)),
        ),
        "get_serving": dict(strip_thinking_cache=False),
        "get_parallel": dict(pp_size=1, attn_cp_size=1, attn_dcp_size=1, attn_dp_size=1),
    }
    spaces = [vars(x) for x in parts["get_exec"].values()] + list(parts.values())
    for part in spaces:
        part.update({name: value for name, value in changes.items() if name in part})
    return {name: SimpleNamespace(**part) for name, part in parts.items()}


def runner(layer: dict | None = None, page_size: int = 1, **model) -> SimpleNamespace:
    """A ModelRunner with one layer of causal attention, but for the changes."""
    attention = RadixAttention(4, 16, 0.25, 2, layer_id=0)
    for name, value in (layer or {}).items():
        setattr(attention, name, value)
    config = dict(attention_arch=AttentionArch.MHA, is_encoder_decoder=False, num_hidden_layers=1)
    return SimpleNamespace(
        model=torch.nn.ModuleList([attention]),
        model_config=SimpleNamespace(**{**config, **model}),
        page_size=page_size,
        dtype=torch.bfloat16,
        kv_cache_dtype=model.get("kv_cache_dtype", torch.bfloat16),
        token_to_kv_pool=None,
    )


def check(a_runner: SimpleNamespace, backends=("vlcache", "vlcache"), **changes) -> None:
    with ExitStack() as stack:
        for name, part in server(**changes).items():
            stack.enter_context(mock.patch(CONTEXT + name, return_value=part))
        stack.enter_context(mock.patch(CONTEXT + "attention_backends", return_value=backends))
        support.check_server(a_runner)


def test_a_plain_server_is_accepted():
    check(runner())


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(speculative_algorithm="EAGLE"), "speculative decoding"),
        (dict(enable_mixed_chunk=True), "--enable-mixed-chunk"),
        (dict(enable_hierarchical_cache=True), "--enable-hierarchical-cache"),
        (dict(disaggregation_mode="prefill"), "disaggregation"),
        (dict(pp_size=2), "pp_size 2, expected 1"),
        (dict(attn_dp_size=2), "attn_dp_size 2, expected 1"),
        (dict(enable_return_routed_experts=True), "--enable-return-routed-experts .* by slot"),
        (dict(enable_return_indexer_topk=True), "--enable-return-indexer-topk .* by slot"),
        (dict(enable_nvidia_megakernel=True), "--enable-nvidia-megakernel"),
        (dict(enable_torch_compile=True), "--enable-torch-compile"),
        (dict(prefill_only_disable_kv_cache=True), "--prefill-only-disable-kv-cache"),
        (dict(kv_canary="log"), "--kv-canary"),
        (dict(backends=("fa3", "vlcache")), "expected vlcache for both"),
    ],
)
def test_features_that_are_not_supported_are_named(change, sentence):
    with pytest.raises(NotImplementedError, match=sentence) as error:
        check(runner(), **change)
    assert str(error.value).startswith("--attention-backend vlcache: ")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(attention_arch=AttentionArch.MLA), "got MLA attention"),
        (dict(is_encoder_decoder=True), "encoder-decoder"),
        (dict(num_hidden_layers=2), r"got attention layers \[0\], expected \[0, 1\]"),
        (dict(page_size=16), "got --page-size 16, expected 1"),
        (dict(kv_cache_dtype=torch.float8_e4m3fn), "got a KV cache of torch.float8_e4m3fn"),
        (dict(layer=dict(sliding_window_size=512)), r"sliding-window attention \(layers \[0\]\)"),
        (dict(layer=dict(is_cross_attention=True)), "cross-attention"),
        (dict(layer=dict(attn_type=AttentionType.ENCODER_ONLY)), "not causal"),
        (dict(layer=dict(logit_cap=30.0)), "capped logits"),
    ],
)
def test_models_that_are_not_supported_are_named(change, sentence):
    with pytest.raises(NotImplementedError, match=sentence):
        check(runner(**change))


@pytest.mark.parametrize("name", ["sinks", "attention_sink_bias"])
def test_sinks_are_named(name):
    """By the block round the layer, as GPT-OSS and MiMo-V2 have them."""
    a_runner = runner()
    a_runner.model[0].register_parameter(name, torch.nn.Parameter(torch.zeros(4)))
    with pytest.raises(NotImplementedError, match="attention with sinks"):
        check(a_runner)
    a_runner.model[0].register_parameter(name, None)  # of a model whose layers have none
    check(a_runner)


def test_a_layer_that_hands_over_more_is_refused():
    with pytest.raises(NotImplementedError, match="vlcache: got sinks, expected None"):
        _refuse(dict(k_rope=None, sinks=torch.zeros(4)))


def test_a_pool_that_is_sized_after_capture_is_refused_with_what_to_do():
    """As SGLang calls it where SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=1, on CUDA alone."""
    pool = object.__new__(OneTensorKVPool)
    pool.quant_method, pool.post_capture_active = UnquantizedKVCacheMethod(), True
    with pytest.raises(NotImplementedError, match="got SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"):
        pool._create_buffers()


def test_another_sglang_is_refused():
    with (
        mock.patch.object(support, "version", return_value="0.5.24"),
        pytest.raises(RuntimeError, match=r"got sglang 0\.5\.24, expected 0\.5\.23"),
    ):
        support.check_version()


def test_hooks_that_were_not_applied_are_named():
    hooks = Hooks()
    target = next(iter(hooks.seats))
    with (
        mock.patch.object(HookRegistry, "_patched", set(hooks.seats) - {target}),
        mock.patch.object(
            HookRegistry,
            "_hooks",
            {t: [(None, hook, None)] for t, (hook, _) in hooks.seats.items()},
        ),
        pytest.raises(RuntimeError, match="did not apply the hooks") as error,
    ):
        hooks.check()
    assert target in str(error.value)


def test_hooks_do_what_sglang_did_until_vlcache_is_the_backend():
    hooks = Hooks()

    def original(*args, **kwargs):
        return args, kwargs

    with mock.patch(CONTEXT + "attention_backends", return_value=("triton", "triton")):
        for hook, args, named in (
            (hooks.kv_pool_class, ("platform",), {"kind": "mha"}),
            (hooks.init_forward_batch, (object, "batch", "runner"), {}),
            (hooks.process_prefill, ("processor", "batch", "result"), {}),
            (hooks.release, ("cache", "request"), {"checkpointed": False}),
            (hooks.max_prefix_len, ("request", 9), {}),
            (hooks.graph_variants, ("config",), {}),
        ):
            assert hook(original, *args, **named) == (args, named)
    assert hooks.private_tokens(lambda kv, page_size: 7, "kv", 1) == 7
    assert hooks.reopen_admission("scheduler", "batch") is None  # the arguments stay
    assert hooks.flush(True, "scheduler") is True


def test_an_engine_that_is_refused_ends_with_the_sentence(tmp_path):
    save_qwen2_5_vl(tmp_path / "model")
    environ = {"VLCACHE_BUDGET": "10%"}
    done, log = start(tmp_path, [{"requests": []}], environ)
    assert done.returncode != 0
    assert "ValueError: VLCACHE_BUDGET: budget: got '10%', expected a float in (0, 1]" in log
