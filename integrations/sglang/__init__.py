"""VL-Cache in SGLang: `sglang serve ... --attention-backend vlcache`, by a plugin.

`pip install vlcache-triton[sglang]` makes SGLang find `register` through the entry point group
`sglang.srt.plugins`; nothing of SGLang is edited. Everything here does nothing until a server
asks for the attention backend "vlcache".
"""

__all__ = ["register"]


def register() -> None:
    """What SGLang calls in each of its processes before it reads the command line."""
    from .plugin import register as register_plugin

    register_plugin()
