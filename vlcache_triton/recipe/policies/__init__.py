"""What is kept of a prompt: VL-Cache, and the published policies that it is compared with.

A policy is a scoring rule and an allocation rule, run by the same plan, kernels and ragged cache as
VL-Cache. All of them compress once, after prefill; where a paper also evicts while decoding (H2O,
StreamingLLM, TGV-KV), that part is left out, so that every policy keeps the same number of tokens.
"""

from __future__ import annotations

from .adakv import adakv
from .aircache import aircache
from .baselines import full, hindsight, random_tokens
from .calibrated import calibrated
from .defensivekv import defensivekv
from .h2o import h2o
from .keydiff import keydiff
from .mixkv import mixkv
from .outside import outside_scores
from .policy import Policy, PromptStatistics
from .pyramidkv import pyramidkv
from .query_agnostic import query_agnostic
from .sharing import adaptive_heads
from .snapkv import snapkv
from .sparsemm import sparsemm
from .streaming_llm import streaming_llm
from .tgv_kv import tgv_kv
from .vl_cache import VL_CACHE, vl_cache_policy

#: What the evaluation compares; the hindsight oracle is made for each prompt, and SparseMM's heads
#: are for each model.
POLICIES = (
    VL_CACHE,
    random_tokens(),
    streaming_llm(),
    h2o(),
    snapkv(),
    pyramidkv(),
    adakv(),
    defensivekv(),
    defensivekv(across_layers=True),
    keydiff(),
    mixkv(),
    aircache(),
    tgv_kv(),
    query_agnostic(),
    full(),
)

__all__ = [
    "POLICIES",
    "VL_CACHE",
    "Policy",
    "PromptStatistics",
    "adakv",
    "adaptive_heads",
    "aircache",
    "calibrated",
    "defensivekv",
    "full",
    "h2o",
    "hindsight",
    "keydiff",
    "mixkv",
    "outside_scores",
    "pyramidkv",
    "query_agnostic",
    "random_tokens",
    "snapkv",
    "sparsemm",
    "streaming_llm",
    "tgv_kv",
    "vl_cache_policy",
]
