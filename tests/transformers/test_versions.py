"""What differs between versions of Transformers, and what is said of versions nobody has tested."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from checks import GREEDY, assert_same_run
from families import LONG
from packaging.specifiers import SpecifierSet
from transformers.generation.utils import DeferredStopCheck

from vlcache_triton.integrations.transformers import support, vl_cache
from vlcache_triton.integrations.transformers.names import CACHE, CACHE_NAMES, rename_cache

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def versions():
    """`support`, which has said nothing of versions yet."""
    support.warn_of_version.cache_clear()
    yield support
    support.warn_of_version.cache_clear()


def test_the_cache_has_the_name_that_outputs_have(family):
    """As they come, without vl_cache."""
    with torch.no_grad():
        assert CACHE in list(family.model(**family.inputs(LONG), use_cache=True))


@pytest.mark.parametrize("name", sorted(CACHE_NAMES))
def test_a_block_takes_the_cache_by_either_name(family, name):
    """Whichever of the two the installed version has: loops need not know."""
    inputs = family.inputs(LONG)
    token = torch.tensor([[7]])
    with vl_cache(family.model, budget=0.4) as session, torch.no_grad():
        cache = session.new_cache(max_new_tokens=4)
        family.model(**inputs, **{name: cache})
        assert session.cache is cache and cache.is_compressed
        out = family.model(input_ids=token, **{name: cache})
        assert out[CACHE] is cache and cache.get_seq_length() == inputs["input_ids"].shape[1] + 1
        cache = session.new_cache(max_new_tokens=8)
        tokens = family.model.generate(**inputs, max_new_tokens=8, **{name: cache})
        assert session.cache is cache and cache.is_compressed
        cache = session.new_cache(max_new_tokens=8)
        lean = session.generate(**inputs, max_new_tokens=8, do_sample=False, **{name: cache})
        assert session.cache is cache and torch.equal(lean, tokens)


def test_a_cache_by_two_names_is_refused():
    assert rename_cache({"cache": None, "past_key_values": 1, "x": 2}) == {CACHE: 1, "x": 2}
    with pytest.raises(ValueError, match="cache: got past_key_values as well"):
        rename_cache({"cache": 1, "past_key_values": 1})


@pytest.mark.parametrize("family", ["llava", "gemma3"], indirect=True)
def test_a_step_too_many_is_never_run(family, monkeypatch):
    """On MPS Transformers stops a step late, and crops the caches that outlive `generate`: here
    every one does (`session.cache`), and none can be cropped."""
    answers = []
    is_supported = DeferredStopCheck.is_supported

    def on_mps(device, *args, **kwargs):
        answers.append(is_supported(torch.device("mps"), *args, **kwargs))
        return answers[-1]

    inputs = family.inputs(LONG)
    width = inputs["input_ids"].shape[1]
    arguments = dict(max_new_tokens=16, do_sample=False)
    with vl_cache(family.model, budget=0.4) as session:
        new = family.model.generate(**inputs, **arguments)[0, width:].tolist()
        end = next(i for i, token in enumerate(new) if i > 3 and token not in new[:i])
        monkeypatch.setattr(DeferredStopCheck, "is_supported", staticmethod(on_mps))
        monkeypatch.setattr(torch, "Event", lambda **_: Mock())  # on the CPU nothing runs behind
        out = family.model.generate(**inputs, **arguments, eos_token_id=new[end])
        assert out[0, width:].tolist() == new[: end + 1]
        assert session.cache.get_seq_length() == width + end
    family.model.generate(**inputs, **arguments)
    assert answers == [False, True]  # the stock model's own cache does not outlive the call


@pytest.mark.parametrize("family", ["llava", "gemma3"], indirect=True)
def test_a_checkpoint_that_asks_for_a_hybrid_cache(family, monkeypatch):
    """As Gemma 3's do, from when Transformers had one; it drops the wish nowadays."""
    inputs = family.inputs(LONG)
    with vl_cache(family.model, budget=0.4) as session:
        expected = family.model.generate(**inputs, **GREEDY)
        with monkeypatch.context() as patch:
            patch.setattr(family.model.generation_config, "cache_implementation", "hybrid")
            out = family.model.generate(**inputs, **GREEDY)
        assert session.cache.is_compressed
    assert_same_run(out, expected, 0.0)


def test_recording_the_past_is_refused(family):
    """Transformers asks for it before it rolls a cache back."""
    with vl_cache(family.model, budget=0.4) as session:
        with pytest.raises(NotImplementedError, match="assisted"):
            session.new_cache().activate_past_recording()
        assert not session.new_cache().is_croppable


@pytest.mark.parametrize("version", ["5.25.0", "5.25.0.dev0", "6.0.0", "5.16.1"])
def test_a_version_that_nobody_has_tested_is_named_once(family, versions, monkeypatch, version):
    monkeypatch.setattr(versions, "__version__", version)
    inputs = family.inputs(LONG)
    with pytest.warns(UserWarning) as caught, vl_cache(family.model, budget=0.4) as session:
        family.model.generate(**inputs, **GREEDY)
        assert session.cache.is_compressed
    (warning,) = (x for x in caught if "vl_cache" in str(x.message))
    assert re.search(rf"{re.escape(version)}.*>=5\.17,<5\.", str(warning.message))
    assert "\n" not in str(warning.message) and warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vl_cache(family.model, budget=0.4):
            pass


def test_a_tested_version_goes_without_a_word(family, versions):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vl_cache(family.model, budget=0.4):
            pass


def test_a_prompt_that_nobody_observed_names_the_versions(family):
    """As where a future Transformers goes round the attention function."""
    inputs = family.inputs(LONG)
    text_config = family.text_config
    said = rf"{type(family.model).__name__}.*{re.escape(transformers.__version__)}.*>=5\.17,<5\."
    with vl_cache(family.model, budget=0.4), pytest.raises(RuntimeError, match=said):
        text_config._attn_implementation_internal = "sdpa"
        family.model.generate(**inputs, **GREEDY)


def test_what_is_supported_is_what_is_asked_for_and_tested():
    """One range, in the dependency, the lock and CI; this environment is inside."""
    supported = SpecifierSet(support.SUPPORTED_VERSIONS)
    assert transformers.__version__ in supported
    assert f'"transformers{support.SUPPORTED_VERSIONS}"' in (ROOT / "pyproject.toml").read_text()
    locked = re.findall(
        r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    assert locked and all(version in supported for version in locked)
    newest = max(tuple(map(int, version.split("."))) for version in locked)
    oldest, bound = (
        tuple(map(int, x.split(".")))
        for x in re.findall(r"[\d.]+", str(support.SUPPORTED_VERSIONS))
    )
    assert bound == (newest[0], newest[1] + 1)
    (tested,) = re.findall(r"transformers==([\d.]+)", (ROOT / ".ci" / "run").read_text())
    assert tuple(map(int, tested.split(".")))[:2] == oldest
