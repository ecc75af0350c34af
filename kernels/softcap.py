"""Device code of a soft cap on logits, as Gemma2 has: cap * tanh(logit / cap)."""

import triton
import triton.language as tl


@triton.jit
def capped(logits, tanh_log2):
    """tanh(logit / cap), for tanh_log2 = 2 * log2(e) / cap: 1 - 2 / (exp(2 x) + 1), finite at both
    ends. The cap itself goes into the factor that comes next."""
    return 1.0 - 2.0 / (tl.exp2(logits * tanh_log2) + 1.0)
