"""Start an engine on the CPU, and what Transformers and our adapter for it say to the same."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from drive import picture
from tiny_checkpoints import save_llava, save_qwen2_5_vl

from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.recipe.config import VLCacheConfig

HERE = Path(__file__).resolve().parent
ENGINE = dict(
    device="cpu",
    attention_backend="vlcache",
    mm_attention_backend="sdpa",
    dtype="float32",
    disable_cuda_graph=True,
    skip_server_warmup=True,
    sleep_on_idle=True,  # else the scheduler takes a core from the client
    max_total_tokens=2048,
    max_running_requests=16,
    decode_log_interval=1,
    log_level="info",
)
STRICT = dict(
    SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY="1",
    SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE="1",
    SGLANG_CHECK_KV_PAGE_INVARIANTS="1",
)
TUNED = VLCacheConfig.tuned(0.25)
MODELS = {"qwen2_5_vl": save_qwen2_5_vl, "llava": save_llava}
IMAGE = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava": "[IMG]",
    "lfm2_vl": "<image>",
}


@dataclass(frozen=True)
class Run:
    """A finished engine: what each step gave, and the log."""

    steps: list
    log: str

    def tokens(self, step: int = 0) -> list[list[int]]:
        return [result["output_ids"] for result in self.steps[step]]

    @property
    def most_running(self) -> int:
        """The largest decode batch."""
        return max(map(int, re.findall(r"Decode batch, #running-req: (\d+)", self.log)))


def run_engine(
    folder: Path, steps: list[dict], environ: dict[str, str], seconds: int = 900, **engine
) -> Run:
    """Run to the end; AssertionError with the log's end where the engine fails.

    Args:
        folder: with the checkpoint `model`; the spec and the results are written there.
        environ: VLCACHE_ variables and SGLang's own; strict memory checks are on.
        seconds: until it is ended.
    """
    done, log = start(folder, steps, environ, seconds, **engine)
    assert done.returncode == 0 and (folder / "out.json").exists(), log[-6000:]
    assert "Traceback" not in log, log[-6000:]
    return Run(json.loads((folder / "out.json").read_text()), log)


def start(
    folder: Path, steps: list[dict], environ: dict[str, str], seconds: int = 900, **engine
) -> tuple[subprocess.CompletedProcess, str]:
    """The finished process and its log, whatever became of it."""
    spec = {"engine": {**ENGINE, "model_path": str(folder / "model"), **engine}, "steps": steps}
    (folder / "out.json").unlink(missing_ok=True)
    (folder / "in.json").write_text(json.dumps(spec))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("VLCACHE_")}
    paths = [str(HERE / "stub"), inherited.get("PYTHONPATH", "")]
    env = {
        **inherited,
        **STRICT,
        "PYTHONPATH": os.pathsep.join(paths),
        "SGLANG_USE_CPU_ENGINE": "1",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        **environ,
    }
    command = [sys.executable, str(HERE / "drive.py"), folder / "in.json", folder / "out.json"]
    with (folder / "log").open("w") as log:
        done = subprocess.run(command, env=env, stdout=log, stderr=log, timeout=seconds)
    return done, (folder / "log").read_text()


def ask(
    name: str, text: str, images: int, max_new_tokens: int, seed: int = 0, before: str = "", **more
) -> dict:
    """A request: some text, images of different sizes, more text."""
    pictures = [[seed + i, 112 + 28 * ((seed + i) % 3), 112] for i in range(images)]
    prompt = {"text": before + IMAGE[name] * images + text, "images": pictures}
    return {**prompt, "max_new_tokens": max_new_tokens, **more}


@functools.cache
def _load(path: Path):
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval(), transformers.AutoProcessor.from_pretrained(path)


def expected_tokens(folder: Path, request: dict, budget: float | None, **choices) -> list[int]:
    """Greedy tokens of Transformers, under our adapter where a budget is given."""
    model, processor = _load(folder / "model")
    images = [picture(*image) for image in request["images"]]
    inputs = processor(text=[request["text"]], images=images or None, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    with nullcontext() if budget is None else vl_cache(model, budget=budget, **choices):
        out = model.generate(**inputs, max_new_tokens=request["max_new_tokens"], do_sample=False)
    return out[0, length:].tolist()
