"""What is built, from which files."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path) -> str:
    """What a command prints, away from what this process or its user has on the path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, tree: Path, out: Path) -> Path:
    """The wheel or the sdist of a tree, by the build backend itself, which needs no network."""
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", out, cwd=tree)
    (built,) = out.iterdir()
    return built


def files_in(folder: Path) -> set[str]:
    """Every file of the folder, also behind links, as paths from its parent."""
    return {
        os.path.relpath(os.path.join(where, name), folder.parent)
        for where, _, names in os.walk(folder, followlinks=True)
        if "__pycache__" not in where
        for name in names
    }
