"""A repository as Hugging Face's `kernels` loads it, and as its kernel-builder builds it.

    build.toml  CARD.md  flake.nix  benchmarks/benchmark.py     for the builder, and for readers
    torch-ext/vlcache_triton/                                   the files of kernels/, a package
    build/torch-cuda/  build/torch-cpu/                         what `get_kernel` imports

All of it is Python, so that building is copying; each variant says in its `metadata.json` what it
is called, and what its files hash to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
NAME, VERSION, LICENSE = "vlcache-triton", 1, "Apache-2.0"  # as build.toml has them
BACKENDS = ("cuda", "cpu")

INIT = '''"""VL-Cache's kernels: KV-cache compression for vision-language models, in Triton."""

from . import operators
from .operators import *

__all__ = operators.__all__
'''


def write_repository(out: Path) -> None:
    """Write the source and both build variants.

    Args:
        out: a folder that does not exist yet.

    Raises:
        ValueError: where it does.
    """
    if out.exists():
        raise ValueError(f"out: got {out}, which exists; expected a new folder")
    for name in ("build.toml", "CARD.md", "flake.nix"):
        _copy(HERE / name, out / name)
    _copy(HERE / "benchmark.py", out / "benchmarks" / "benchmark.py")
    package = out / "torch-ext" / NAME.replace("-", "_")
    _write_package(package)
    for backend in BACKENDS:
        variant = out / "build" / f"torch-{backend}"
        shutil.copytree(package, variant)
        _write_metadata(variant, backend)


def _write_package(package: Path) -> None:
    for source in sorted(KERNELS.glob("*.py")):
        _copy(source, package / source.name)
    (package / "__init__.py").write_text(INIT)


def _write_metadata(variant: Path, backend: str) -> None:
    """Two kernels of one name may be loaded: `id` names the module, so it is of the contents."""
    hashes = {x.name: hashlib.sha256(x.read_bytes()).digest() for x in sorted(variant.iterdir())}
    contents = hashlib.sha256(b"".join(hashes.values())).hexdigest()[:7]
    metadata = {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{backend}_{contents}",
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(x).decode() for name, x in hashes.items()},
        },
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
