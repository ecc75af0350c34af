"""`vlcache env`: what to paste into a bug report."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .console import one_line, print_json, size, waiting
from .options import JsonOption

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "vlcache-triton",
    "torch",
    "triton",
    "transformers",
    "huggingface-hub",
    "numpy",
    "pillow",
    "torchvision",
    "sglang",
    "flash-attn",
    "lmms-eval",
)


def env(json: JsonOption = False) -> None:
    """Print versions, GPU, driver and backend, for bug reports."""
    with waiting("looking"):
        found = environment()
    if json:
        print_json(found)
        return
    table = Table(show_header=False)
    for name, value in _lines(found):
        table.add_row(name, value)
    Console().print(table)


def environment() -> dict[str, Any]:
    """What the command prints, ready for JSON; None for what is not there."""
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [
            {
                "name": gpu.name,
                "compute_capability": f"{gpu.major}.{gpu.minor}",
                "memory_bytes": gpu.total_memory,
            }
            for gpu in gpus
        ],
        "driver": _driver(),
        "torch_cuda": torch.version.cuda,
        "backend": _backend(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET"),
    }


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    missing = "not installed"
    lines = [(name, value or missing) for name, value in found["packages"].items()]
    lines += [("Python", found["python"]), ("platform", found["platform"])]
    lines += [("CPU cores", str(found["cpus"]))]
    for gpu in found["gpus"]:
        memory = size(gpu["memory_bytes"])
        lines.append(("GPU", f"{gpu['name']}, {memory}, sm {gpu['compute_capability']}"))
    if not found["gpus"]:
        lines.append(("GPU", "none that torch can use"))
    lines += [("driver", found["driver"] or "none found")]
    lines += [("CUDA of torch", found["torch_cuda"] or "none, built for CPUs")]
    lines += [("backend", found["backend"])]
    lines += [("TRITON_INTERPRET", found["TRITON_INTERPRET"] or "not set")]
    return lines


def _backend(device: torch.device) -> str:
    """What serves tensors there, or why nothing does, which is what a report is then about."""
    from vlcache_triton.ops import get_backend

    try:
        return get_backend("auto", device).name
    except Exception as error:
        return f"none: {type(error).__name__}: {one_line(str(error))}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """NVIDIA's, which torch does not tell."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split("\n")
    return lines[0].strip() or None if done.returncode == 0 else None
