"""Families that cannot be compressed are refused when the block is entered."""

from __future__ import annotations

import pytest
import refused_models
import transformers
from checks import nothing_computed

from vlcache_triton import VLCacheConfig
from vlcache_triton.integrations.transformers import VLCache, vl_cache

FAMILIES = ["paligemma", "mllama", "gemma3n", "gemma4_shared"]


@pytest.mark.parametrize("budget", [0.4, 1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_entering_the_block_is_refused(name, budget):
    model = getattr(refused_models, name)().eval()
    refused = pytest.raises(NotImplementedError, match=r".{40}")  # it says what and why
    with nothing_computed(model), refused, vl_cache(model, budget=budget):
        pytest.fail("the block was entered")


@pytest.mark.parametrize("name", ["mllama", "gemma3n", "gemma4_shared"])
def test_a_cache_for_such_a_model_is_refused(name):
    model = getattr(refused_models, name)()
    with pytest.raises(NotImplementedError):
        VLCache(model.config, VLCacheConfig(budget=0.4))


def test_a_configuration_of_unlike_layers():
    """Its latent rank is each layer's own, and cannot be asked for otherwise."""
    if not hasattr(transformers, "Dots3NoteConfig"):
        pytest.skip("this Transformers has no such model")
    with pytest.raises(NotImplementedError, match=r"'dots3_note', .*MLA"):
        VLCache(transformers.Dots3NoteConfig(), VLCacheConfig(budget=0.4))
