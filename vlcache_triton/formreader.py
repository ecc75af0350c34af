"""The embedded model, at the address that examples have: `vlcache_triton.apps.formreader`."""

from .apps.formreader import *  # noqa: F403
from .apps.formreader import __all__ as __all__
