"""Serve image prompts with SGLang, three ways, and let SGLang's own client measure each.

1. production: the server as it starts by default (its attention backend, its CUDA graphs).
2. full cache: the flags of line 3, `--attention-backend vlcache`, at budget 1.0. What differs
   from line 1 is what our kernels and flags cost or gain by themselves.
3. vlcache: the same at the budget asked for. What differs from line 2 is compression alone.

Every line gets a fresh server with the same KV pool, and the same requests. Throughput, time to
first token and inter-token latency are the client's; the number of requests that decode at once,
and of those that were retracted for want of memory, are read from the server's log.

    python benchmarks/sglang_serving.py --model Qwen/Qwen2.5-VL-7B-Instruct
    python benchmarks/sglang_serving.py --miniature       # on a CPU: a tiny random model

The miniature runs in the environment of `.ci/sglang FOLDER`. Its times say nothing about a GPU:
lines 2 and 3 run interpreted Triton kernels, line 1 plain torch. How many requests run at once in
the same pool depends on memory alone, and holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_FLAGS = "--device cpu --dtype float32 --mm-attention-backend sdpa --disable-cuda-graph"
START_SECONDS = 900  # until the server answers
MINIATURE_NOTE = (
    "Times say nothing about a GPU: the first line runs plain torch, the others interpreted Triton"
    " kernels, on a machine shared with other work. The memory columns hold."
)
RESULTS = {  # field of the client's record: heading
    "completed": "completed",
    "request_throughput": "req/s",
    "output_throughput": "out tok/s",
    "median_ttft_ms": "TTFT p50 ms",
    "p99_ttft_ms": "TTFT p99 ms",
    "median_itl_ms": "ITL p50 ms",
    "p99_itl_ms": "ITL p99 ms",
    "most_running": "running at once",
    "retracted": "retracted",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint; not with --miniature")
    parser.add_argument("--miniature", action="store_true", help="a tiny random model on the CPU")
    parser.add_argument("--budget", default="0.1", help="VLCACHE_BUDGET of the third line")
    parser.add_argument("--image-resolution", default="720p")
    parser.add_argument("--input-len", type=int, default=64, help="text tokens behind the image")
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--num-prompts", type=int, default=128)
    parser.add_argument("--pool", type=int, help="--max-total-tokens of all servers")
    parser.add_argument("--server-flags", default="", help="more flags, for all servers")
    parser.add_argument("--port", type=int, default=30017)
    parser.add_argument("--out", type=Path, help="write the results there, as JSON")
    options = parser.parse_args(arguments)
    if bool(options.model) == options.miniature:
        parser.error("give either --model or --miniature")
    return options


def shrink(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Options and environment of the miniature: 64 image tokens a prompt, a pool for two."""
    sys.path.insert(0, str(ROOT / "tests" / "sglang"))
    from tiny_checkpoints import save_qwen2_5_vl

    save_qwen2_5_vl(folder / "model")
    options.model = str(folder / "model")
    options.image_resolution, options.input_len = "224x224", 16
    options.output_len, options.num_prompts = 24, 16
    options.pool = options.pool or 300
    options.server_flags += f" {CPU_FLAGS} --chunked-prefill-size 128 --max-running-requests 16"
    stub = str(ROOT / "tests" / "sglang" / "stub")
    return {
        "PYTHONPATH": os.pathsep.join([stub, os.environ.get("PYTHONPATH", "")]),
        "SGLANG_USE_CPU_ENGINE": "1",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def running_server(
    options: argparse.Namespace, flags: str, environ: dict[str, str], log: Path
) -> Iterator[str]:
    """The base URL of a server that answers, until the block ends."""
    pool = f"--max-total-tokens {options.pool}" if options.pool else ""
    more = f"{pool} {options.server_flags} {flags} --decode-log-interval 1"
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", options.model]
    command += ["--port", str(options.port), *shlex.split(more)]
    url = f"http://127.0.0.1:{options.port}"
    with log.open("w") as file:
        server = subprocess.Popen(
            command, env=environ, stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_until_ready(url, server, log)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def wait_until_ready(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(url + "/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass  # not up yet
        time.sleep(1)
    raise TimeoutError(f"the server did not answer in {START_SECONDS} s; its log is {log}")


def measure(options: argparse.Namespace, url: str, environ: dict[str, str], out: Path) -> dict:
    """The client's record of all requests, sent at once."""
    flags = f"""
        --backend sglang-oai-chat --base-url {url} --model {options.model}
        --dataset-name image --image-count 1 --image-resolution {options.image_resolution}
        --random-input-len {options.input_len} --random-output-len {options.output_len}
        --random-range-ratio 1.0 --num-prompts {options.num_prompts} --seed 1
        --warmup-requests 1 --disable-tqdm --output-file {out}
    """
    command = [sys.executable, "-m", "sglang.bench_serving", *shlex.split(flags)]
    subprocess.run(command, env=environ, check=True)
    return json.loads(out.read_text().splitlines()[-1])


def run_line(
    name: str, options: argparse.Namespace, flags: str, environ: dict[str, str], folder: Path
) -> dict:
    """One line of the table, RESULTS by field."""
    log = folder / f"{name.replace(' ', '_')}.log"
    with running_server(options, flags, environ, log) as url:
        record = measure(options, url, environ, folder / f"{log.stem}.jsonl")
    text = log.read_text()
    running = [int(n) for n in re.findall(r"Decode batch, #running-req: (\d+)", text)]
    retracted = [int(n) for n in re.findall(r"#retracted_reqs: (\d+)", text)]
    record |= {"most_running": max(running), "retracted": sum(retracted)}
    return {"line": name, **{field: record[field] for field in RESULTS}}


def table(lines: list[dict]) -> str:
    """Markdown."""
    rows = ["| line | " + " | ".join(RESULTS.values()) + " |", "|---" * (len(RESULTS) + 1) + "|"]
    for line in lines:
        cells = [f"{line[f]:.1f}" if isinstance(line[f], float) else str(line[f]) for f in RESULTS]
        rows.append(f"| {line['line']} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores of {platform.machine()}, no GPU: Triton interpreted"


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("VLCACHE_")}
        environ = {**inherited, **(shrink(options, folder) if options.miniature else {})}
        ours = "--attention-backend vlcache"
        lines = [
            run_line("production default", options, "", environ, folder),
            run_line("full cache", options, ours, {**environ, "VLCACHE_BUDGET": "1.0"}, folder),
            run_line(
                "vlcache", options, ours, {**environ, "VLCACHE_BUDGET": options.budget}, folder
            ),
        ]
    lines[-1]["line"] += f" {options.budget}"
    print(table(lines))
    if options.out is not None:
        packages = ("sglang", "torch", "triton", "transformers", "vlcache-triton")
        chosen = {k: v for k, v in vars(options).items() if k not in ("out", "port")}
        if options.miniature:
            chosen["model"] = "tiny random Qwen2.5-VL, 4 layers"
        report = {
            "note": MINIATURE_NOTE if options.miniature else "",
            "date": date.today().isoformat(),
            "machine": machine(),
            "versions": {name: version(name) for name in packages},
            "options": chosen,
            "lines": lines,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
