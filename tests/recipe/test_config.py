"""What a user may choose: every wrong value is named, and a number may be NumPy's."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest

from vlcache_triton import VLCacheConfig

FIELDS = [field.name for field in dataclasses.fields(VLCacheConfig)]
WRONG = {
    "budget": (0.0, 1.5, -1, 0, True, "0.1", None, [0.1], float("nan"), 1j),
    "threshold": (0.0, 1, 1.5, "0.01", None, float("nan"), True),
    "recent_fraction": (1.1, -0.1, "half", None, False, [0.1]),
    "min_layer_budget": (-0.1, 1.1, "0", None, True),
    "max_layer_budget": (0.001, 1.1, "1", None, True, float("nan")),
    "clipping": ("literal", None, True, 1, ["paper"]),
    "allocation": ("magic", None, 1, ["uniform"], np.array([1, 2])),
    "granularity": ("head", None, True, {"layer"}),
    "row_reduction": ("mean", None, 1, ["max"]),
    "group_reduction": ("sum", None, True, {"max"}),
    "smoothing": (0, 2, 3.0, "3", None, True),
    "remainder": ("sum", None, True, 1, ("mean",)),
    "max_cache_tokens": (0, 1, -3, 2.0, "16", False),
    "kv_cache_dtype": ("fp8", "fp8_e5m2", None, True, 8, ["auto"]),
    "max_query_rows": (0, -3, 2.0, "16", False),
    "text_window": (0, 1.5, "16", True),
}


def test_every_field_has_its_wrong_values():
    assert list(WRONG) == FIELDS


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in FIELDS for value in WRONG[name]]
)
def test_a_bad_choice_is_named(name, value):
    with pytest.raises(ValueError) as error:
        VLCacheConfig(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name}: got {value!r}, expected ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("one", [1, np.int64(1)])
def test_a_budget_of_the_int_1_is_refused_with_what_was_meant(one):
    """It would keep one token a layer, and is nearly always a mistake for 1.0."""
    for make in (VLCacheConfig, VLCacheConfig.tuned):
        with pytest.raises(ValueError, match=r"^budget: got the int 1, one token a layer") as error:
            make(budget=one)
        assert "expected 1.0 (the whole cache)" in str(error.value)
    assert VLCacheConfig(budget=1.0).is_lossless
    assert not VLCacheConfig(budget=2).is_lossless
    assert not VLCacheConfig(budget=1.0, max_cache_tokens=100).is_lossless


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, Fraction])
def test_a_number_of_another_kind_is_a_float(kind):
    names = ("budget", "threshold", "recent_fraction", "min_layer_budget", "max_layer_budget")
    config = VLCacheConfig(**{name: kind(0.25) for name in names})
    assert config == VLCacheConfig(**dict.fromkeys(names, 0.25))
    assert all(type(getattr(config, name)) is float for name in names)
    assert VLCacheConfig(budget=kind(1.0)).is_lossless
    json.dumps(dataclasses.asdict(config))


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint16])
def test_an_integer_of_another_kind_is_an_int(kind):
    names = ("budget", "smoothing", "max_cache_tokens", "max_query_rows", "text_window")
    config = VLCacheConfig(**{name: kind(7) for name in names})
    assert config == VLCacheConfig(**dict.fromkeys(names, 7))
    assert all(type(getattr(config, name)) is int for name in names)
    json.dumps(dataclasses.asdict(config))


def test_whole_numbers_are_shares_where_they_can_be_nothing_else():
    config = VLCacheConfig(recent_fraction=1, min_layer_budget=0, max_layer_budget=1)
    assert config == VLCacheConfig(recent_fraction=1.0, min_layer_budget=0.0, max_layer_budget=1.0)
