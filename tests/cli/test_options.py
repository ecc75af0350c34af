"""The options that commands share: what they offer, where they arrive, and how help shows them."""

import itertools
import json
from contextlib import contextmanager

import pytest
import torch

import vlcache_triton
from vlcache_triton import VLCacheConfig
from vlcache_triton.apps.cli import vlm
from vlcache_triton.apps.cli.eval import SUITE_NAMES
from vlcache_triton.apps.cli.options import PolicyName
from vlcache_triton.apps.evaluation import SUITES
from vlcache_triton.recipe.policies import POLICIES

COMMANDS = ["demo", "generate", "inspect", "eval", "env"]


def asked(command, page, tmp_path):
    """The least that a command is asked with, to answer something."""
    question = ("--image", page, "--prompt", "How many fields are there?")
    return {
        "demo": ("demo", "--questions", 1, "--out", tmp_path / "page.png"),
        "generate": ("generate", *question, "--max-new-tokens", 3),
        "inspect": ("inspect", *question),
    }[command]


@pytest.fixture
def sessions(monkeypatch):
    """The blocks that a command has compressed in."""
    entered = []
    original = vlm.vl_cache

    @contextmanager
    def watched(*args, **kwargs):
        with original(*args, **kwargs) as session:
            entered.append(session)
            yield session

    monkeypatch.setattr(vlm, "vl_cache", watched)
    return entered


def test_the_names_are_the_librarys():
    """Told without importing torch, which --help would wait for."""
    assert [name.value for name in PolicyName] == [policy.name for policy in POLICIES]
    assert [name.load() for name in PolicyName] == list(POLICIES)
    assert list(SUITE_NAMES) == [suite.name for suite in SUITES]


@pytest.mark.parametrize("command", ["demo", "generate", "inspect"])
def test_policy_and_dtype_arrive(vlcache, sessions, page, tmp_path, command):
    options = ("--policy", "snapkv", "--dtype", "bfloat16", "--device", "cpu", "--budget", 0.5)
    outcome = vlcache(*asked(command, page, tmp_path), *options, "--json")
    assert outcome.code == 0, outcome.err
    assert sessions
    for session in sessions:
        assert (session.policy.name, session.config) == ("snapkv", VLCacheConfig(budget=0.5))
        assert session.model.dtype == torch.bfloat16
        assert not session.streaming
    result = json.loads(outcome.out)
    assert (result["policy"], result["preset"]) == ("snapkv", "paper")


@pytest.mark.parametrize("command", ["demo", "generate"])
def test_preset_and_streaming_arrive(vlcache, sessions, page, tmp_path, command):
    options = ("--preset", "tuned", "--streaming", "--budget", 0.5)
    outcome = vlcache(*asked(command, page, tmp_path), *options, "--json")
    assert outcome.code == 0, outcome.err
    assert sessions
    for session in sessions:
        assert session.streaming and session.config == VLCacheConfig.tuned(budget=0.5)
    result = json.loads(outcome.out)
    assert (result["policy"], result["preset"]) == ("vl_cache", "tuned")


def test_the_full_policy_keeps_all(vlcache, page, tmp_path):
    command = asked("generate", page, tmp_path)
    result = json.loads(vlcache(*command, "--policy", "full", "--json").out)
    assert result["kv_bytes"] == result["full_kv_bytes"]
    assert result["note"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--policy", "snap"), ("--policy", "snapkv", "adakv")),
        (("--preset", "best"), ("--preset", "paper", "tuned")),
        (("--dtype", "float8"), ("--dtype", "bfloat16")),
        (("--policy", "h2o", "--preset", "tuned"), ("preset: got 'tuned'", "'h2o'")),
        (("--policy", "h2o", "--streaming"), ("streaming: got it", "'h2o'")),
        (("--device", "abacus"), ("device: got 'abacus'", "cuda:N")),
        (("--device", "meta"), ("device: got 'meta'", "cuda:N")),
        (("--device", "cuda:99"), ("device: got 'cuda:99'", "vlcache env")),
    ],
)
def test_what_does_not_fit_is_one_line(vlcache, page, tmp_path, options, words):
    outcome = vlcache(*asked("generate", page, tmp_path), *options)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert all(word in line for word in words)


def test_inspect_of_the_full_policy_measures_nothing(vlcache, page, tmp_path):
    outcome = vlcache(*asked("inspect", page, tmp_path), "--policy", "full")
    assert outcome.code == 2 and "policy: got full" in outcome.err


def test_the_version(vlcache):
    outcome = vlcache("--version")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"vlcache-triton {vlcache_triton.__version__}\n"


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_wraps(vlcache, monkeypatch, command, columns):
    """Each line is as full as it can be, and no option or word is cut off."""
    monkeypatch.setenv("COLUMNS", str(columns))
    text = vlcache(command, "--help").out
    assert "…" not in text
    assert max(map(len, text.splitlines())) == columns
    prose = text.partition("╭")[0].split("\n")
    for line, following in itertools.pairwise(prose):
        if line.strip() and following.strip():
            assert len(f"{line.rstrip()} {following.split()[0]}") > columns - 1, line


@pytest.mark.parametrize("command", ["demo", "generate", "inspect"])
def test_help_lists_the_policies(vlcache, command):
    words = vlcache(command, "--help").out.replace("│", " ").split()
    assert {f"{policy.name}," for policy in POLICIES[:-1]} | {"full."} <= set(words)
    assert {"paper:", "tuned:", "bfloat16."} <= set(words)


def test_help_lists_the_suites(vlcache):
    text = " ".join(vlcache("eval", "--help").out.replace("│", " ").split())
    assert "; ".join(SUITE_NAMES) in text
    assert "(form-reader)" in text and "(all)" in text
