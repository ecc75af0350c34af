"""Who reads req_to_token, where packing leaves 0 for what it evicted: each is accounted for."""

import re
from pathlib import Path

import sglang

READS = re.compile(r"req_to_token\[")
REFUSED = {  # folder: what is refused at start, which alone runs it
    "layers/attention": "every attention backend but this one",
    "hardware_backend": "MLX and NPU backends",
    "speculative": "speculative decoding",
    "disaggregation": "prefill-decode disaggregation",
    "kv_canary": "--kv-canary",
    "dllm": "diffusion language models",
    "mem_cache/sparsity": "HiSparse",
    "mem_cache/storage": "external caches",
}
AUDITED = {
    "beam_search/fork.py": "beams are left whole",
    "managers/hisparse_coordinator.py": "--enable-hisparse is refused",
    "managers/overlap_utils.py": "the tails of mixed chunks, which are refused",
    "managers/schedule_batch.py": "offloads of disaggregation, tails of mixed chunks with drafts",
    "mem_cache/allocation.py": "prefixes of prompts in prefill; last slots of pages above 1",
    "mem_cache/base_prefix_cache.py": "frees from cache_protected_len on, which is behind them",
    "mem_cache/common.py": "disaggregation; sliding windows",
    "mem_cache/memory_pool.py": "writes; FP4 caches",
    "mem_cache/page_interleave_pool.py": "KV sharding, whose pool is not ours",
    "mem_cache/radix_cache.py": "inserts; skip_radix_cache_insert is set",
    "mem_cache/unified_radix_cache.py": "inserts, likewise; backups of disaggregation",
    "model_executor/cpu_graph_runner.py": "--enable-torch-compile, which is refused",
    "model_executor/encoder_swa_replay.py": "sliding windows",
    "models/mindspore.py": "models whose attention is not RadixAttention",
    "state_capturer/base.py": "routed experts and indexer top-k, which are refused",
}


def test_every_reader_of_req_to_token_is_accounted_for():
    root = Path(sglang.__file__).parent / "srt"
    readers = set()
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if name.startswith(tuple(folder + "/" for folder in REFUSED)):
            continue
        if READS.search(path.read_text()):
            readers.add(name)
    assert readers == set(AUDITED)
