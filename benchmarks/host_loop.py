"""What a decoding loop costs the host, a token: the model's step is taken out, the rest is timed.

    python benchmarks/host_loop.py [benchmarks/results]     # writes host_loop.json there

Input preparation, logits processors, stopping, bookkeeping: a GPU waits for all of it, unless its
step takes longer. On a machine without one the tensors' work is the CPU's, so that wide batches
count for more than they would; launches and waits for the device do not count at all.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import llava
import transformers
from measure import environment
from transformers import PreTrainedModel

from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.graph import Step

LENGTH = 64
REPEATS = 5
PROCESSORS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95},
}


@contextmanager
def nothing_launched():
    """Steps run once, for something to be read back, and cost nothing from then on."""
    launch = Step.launch

    def once(step: Step, *args: Any) -> None:
        if not step._places:
            launch(step, *args)

    with mock.patch.object(Step, "launch", once):
        yield


@contextmanager
def nothing_computed(model: PreTrainedModel):
    """The same for Transformers' own cache: forward passes after the first repeat its logits."""
    forward, outputs = model.forward, []

    def repeat(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(forward(*args, **kwargs))
            outputs[0].logits = outputs[0].logits[:, -1:]
        return outputs[0]

    with mock.patch.object(model, "forward", repeat):
        yield


def seconds_a_token(generate: Callable[..., Any], inputs: dict, num_tokens: int, **more) -> float:
    """The median of the time that further tokens take."""

    def once(n: int) -> float:
        start = time.perf_counter()
        generate(**inputs, **more, max_new_tokens=n, eos_token_id=None)
        return time.perf_counter() - start

    once(num_tokens)
    few = num_tokens // 4
    spans = [once(num_tokens) - once(few) for _ in range(REPEATS)]
    return statistics.median(spans) / (num_tokens - few)


def measure(num_tokens: int, batches: tuple[int, ...] = (1, 16)) -> list[dict[str, Any]]:
    """Milliseconds a token of each loop."""
    with mock.patch.dict(llava.MINIATURE, vocab_size=llava.SEVEN_B["vocab_size"]):
        model = llava.build.__wrapped__(None)
    rows = []
    for num_seqs in batches:
        inputs = llava.prompt(model, num_seqs, LENGTH)
        for processors, more in PROCESSORS.items():
            found: dict[str, Any] = {"num_seqs": num_seqs, "processors": processors}
            with nothing_computed(model):
                found["transformers"] = seconds_a_token(
                    model.generate, inputs, num_tokens, use_cache=True, **more
                )
            with nothing_launched():
                for name in ("stock", "lean"):
                    with vl_cache(model, budget=0.1, cuda_graph=True) as session:
                        generate = session.generate if name == "lean" else model.generate
                        found[name] = seconds_a_token(generate, inputs, num_tokens, **more)
            rows.append({k: x * 1e3 if isinstance(x, float) else x for k, x in found.items()})
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = measure(num_tokens=400)
    print("| B | processors | Transformers, ms | vl_cache, generate | vl_cache, session.generate |")
    print("|---|---|---|---|---|")
    for x in rows:
        times = " | ".join(f"{x[name]:.3f}" for name in ("transformers", "stock", "lean"))
        print(f"| {x['num_seqs']} | {x['processors']} | {times} |")
    if len(sys.argv) > 1:
        facts = {**environment(), "transformers": transformers.__version__, "ms_a_token": rows}
        (Path(sys.argv[1]) / "host_loop.json").write_text(json.dumps(facts, indent=1) + "\n")
