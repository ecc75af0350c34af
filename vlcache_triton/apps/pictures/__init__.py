"""Pictures of what compression keeps of a prompt: `vlcache inspect --out`."""

from .draw import draw_report
from .grids import ImageGrid, UnknownGridError, image_grids
