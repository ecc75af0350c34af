"""The application: its commands, and what a user sees when one cannot go on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from vlcache_triton import __version__

from .calibrate import calibrate
from .console import UserError, one_line
from .demo import demo
from .env import env
from .eval import evaluate
from .generate import generate
from .inspect import inspect
from .reproduce import reproduce

app = typer.Typer(
    name="vlcache",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # the others keep a docstring's line ends
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, generate, inspect):
    app.command()(command)
app.command("eval")(evaluate)
app.command()(calibrate)
app.command()(reproduce)
app.command()(env)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"vlcache-triton {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """VL-Cache: vision-language models that answer from a compressed KV cache."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run `vlcache ARGUMENTS` (default: those of the process) and return the exit code.

    What the user can put right is one line on stderr and exit code 2, never a traceback; any
    other exception is a bug of ours and shows as one.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        return app(arguments, prog_name="vlcache", standalone_mode=False) or 0
    except UserError as error:
        message = str(error)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        # Usage errors: click's before typer 0.26, typer's own since. Both know format_message.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
    print(f"vlcache: {one_line(message)}", file=sys.stderr)
    return 2
