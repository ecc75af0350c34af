"""Stands in for SGLang's compiled kernels, which no registry has for the CPU.

Every symbol imports and calling one raises. `convert_weight_packed` stays undefined: SGLang takes
its presence for a CPU with AMX, and would then call the kernels.
"""

import sys

import short_conv
import torch

sys.modules["sgl_kernel.mamba"] = sys.modules[__name__]
sys.modules["sglang.srt.layers.attention.mamba.causal_conv1d"] = short_conv
# SGLang binds these operators when it is imported; declared, and never run.
OPERATORS = """
    apply_multidimensional_rope_cpu apply_rotary_pos_emb_cpu biased_grouped_topk_cpu bmm_cpu
    conv3d_embed_cpu decode_attention_cpu extend_attention_cpu fp8_per_tensor_scaled_mm_cpu
    fp8_scaled_mm_cpu fused_add_rmsnorm_cpu fused_dual_residual_rmsnorm_cpu fused_experts_cpu
    fused_gdn_gating_cpu fused_input_proj_cpu fused_moe_router_cpu fused_qk_gemma_rmsnorm_cpu
    fused_qk_gemma_rmsnorm_with_gate_cpu fused_qk_norm_cpu fused_qk_norm_rope_cpu
    fused_qk_rmsnorm_apply_from_stats_cpu fused_qk_rmsnorm_cpu fused_qk_rmsnorm_sumsq_cpu
    fused_qkvzba_split_reshape_cat_contiguous_cpu fused_qkvzba_split_reshape_cat_cpu
    fused_rmsnorm_gated_cpu fused_scale_shift_cpu fused_sigmoid_gating_delta_rule_update_cpu
    fused_sigmoid_mul_cpu gelu_and_mul_cpu gelu_tanh_and_mul_cpu gemma3_rmsnorm_cpu
    gemma4_rmsnorm_cpu gemma_fused_add_rmsnorm_cpu gemma_rmsnorm_cpu grouped_topk_cpu
    image_preprocess_cpu int4_scaled_mm_cpu l2norm_cpu layernorm_cpu
    multimodal_rotary_embedding_cpu murmur_hash32_cpu rmsnorm_cpu rotary_embedding_cpu
    shared_expert_cpu silu_and_mul_cpu store_cache_cpu topk_sigmoid_cpu topk_softmax_cpu
    flash_attn_varlen_func
""".split()  # noqa: SIM905

_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _name in OPERATORS:
    _library.define(f"{_name}(Tensor a, Tensor b) -> Tensor")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name}: there are no compiled kernels here")

    return missing
