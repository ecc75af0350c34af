"""`python -m vlcache_triton.apps.cli`, where the script `vlcache` is not on the path."""

import sys

from . import main

sys.exit(main())
