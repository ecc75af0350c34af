"""The embedded model, loaded once; the evaluation never alters it."""

import pytest

from vlcache_triton.apps.formreader import load_form_reader


@pytest.fixture(scope="session")
def form_reader():
    """(model, processor)"""
    return load_form_reader()
