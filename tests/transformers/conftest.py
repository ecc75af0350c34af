"""Fixtures of the adapter's tests: one tiny model of each family, built once and never altered."""

from __future__ import annotations

import functools

import families
import pytest
from checks import model_state

build = functools.cache(families.build)


@pytest.fixture
def family(request):
    """The family that the test is parametrised with (indirectly), LLaVA-1.5 where it is not."""
    built = build(getattr(request, "param", "llava"))
    before = model_state(built.model)
    yield built
    assert model_state(built.model) == before, "the test left the model altered"
