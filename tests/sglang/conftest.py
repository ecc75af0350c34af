"""Engine tests need sglang, which lives in an environment of its own (.ci/sglang); skip without.

The others hold the parts that need no engine, and run everywhere.
"""

from importlib.metadata import PackageNotFoundError, version

collect_ignore_glob = []
try:
    version("sglang")  # an import could find this folder
except PackageNotFoundError:
    collect_ignore_glob = ["test_engine_*.py", "test_refusals.py"]
