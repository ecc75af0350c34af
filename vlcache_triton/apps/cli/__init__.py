"""The command line, `vlcache`. Importing this loads nothing heavy."""

import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich", "transformers", "PIL", "matplotlib")


def main() -> int:
    """The entry point: run the command line, and return its exit code."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"vlcache: {', '.join(missing)} not installed; the command line needs"
            " pip install 'vlcache-triton[cli]'",
            file=sys.stderr,
        )
        return 2
    from .app import run

    return run()
