"""Device code of fp8 (e4m3) rows: stored value * descale = the row, as FlashAttention-3 has it."""

import triton
import triton.language as tl


@triton.jit
def quantised(rows, descale):
    """The nearest codes, ties to even. What is too large saturates: e4m3 has no infinity, and a
    cast alone would make it NaN."""
    codes = tl.div_rn(rows.to(tl.float32), descale)  # as torch divides, to the bit
    return tl.clamp(codes, -448.0, 448.0, tl.PropagateNan.ALL).to(tl.float8e4nv)
