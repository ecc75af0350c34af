"""The kernels as a kernel of Hugging Face's Hub: `python -m vlcache_triton.integrations.hub OUT`.

`write_repository` makes it of `kernels/`; nothing here publishes anything.
"""

from .repository import write_repository

__all__ = ["write_repository"]
