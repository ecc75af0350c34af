"""Run `vlcache` in this process, on a page whose answers are known."""

from typing import NamedTuple

import pytest

from vlcache_triton.apps.cli.app import run
from vlcache_triton.apps.formreader import Dialogue, draw_dialogue, render


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def vlcache(capfd):
    """`vlcache("demo", "--json")` as a shell sees it."""

    def call(*arguments: object) -> Outcome:
        code = run([str(argument) for argument in arguments])
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def dialogue() -> Dialogue:
    """A page that the model reads right, and a question about it."""
    return draw_dialogue("page-1", ["value"])


@pytest.fixture(scope="session")
def page(dialogue, tmp_path_factory):
    """Its picture, as a file."""
    path = tmp_path_factory.mktemp("page") / "page.png"
    render(dialogue.pages[0]).save(path)
    return path
