"""`python -m vlcache_triton.integrations.hub OUT` writes the repository to OUT, a new folder."""

import sys
from pathlib import Path

from .repository import write_repository

if len(sys.argv) != 2:
    sys.exit(__doc__)
write_repository(Path(sys.argv[1]))
