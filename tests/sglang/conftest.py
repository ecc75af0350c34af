"""Engine tests need sglang, which lives in an environment of its own (.ci/sglang); skip without.

The others hold the parts that need no engine, and run everywhere.
"""

import importlib.util

collect_ignore_glob = []
if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_engine_*.py", "test_refusals.py"]
