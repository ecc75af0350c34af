"""The script starts fast, and says what it lacks."""

import subprocess
import sys

import pytest

import vlcache_triton.apps.cli


def test_help_names_the_commands_and_loads_no_model_library():
    code = (
        "import sys; from vlcache_triton.apps.cli import main; sys.argv = ['vlcache', '--help'];"
        "assert main() == 0;"
        "print([m for m in ('torch', 'transformers', 'PIL', 'matplotlib', 'triton')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, loaded = done.stdout.splitlines()
    for command in ("demo", "generate", "inspect", "eval", "env"):
        assert any(f" {command} " in line for line in text)
    assert loaded == "[]"


@pytest.mark.parametrize("name", ["typer", "matplotlib"])
def test_without_the_extra_one_line_says_so(monkeypatch, capsys, name):
    find_spec = vlcache_triton.apps.cli.find_spec
    monkeypatch.setattr(
        vlcache_triton.apps.cli, "find_spec", lambda n: None if n == name else find_spec(n)
    )
    assert vlcache_triton.apps.cli.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert name in line and "vlcache-triton[cli]" in line


def test_without_arguments_it_shows_the_help(vlcache):
    bare, helped = vlcache(), vlcache("--help")
    assert bare.code == helped.code == 0
    assert bare.out == helped.out != ""


def test_an_interrupt_ends_it_quietly(vlcache, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vlcache_triton.apps.cli.vlm.VisionLanguageModel.encode", interrupt)
    outcome = vlcache("demo", "--out", tmp_path / "page.png")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "")
