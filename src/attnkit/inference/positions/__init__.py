"""Position policies: other rotation frequencies for contexts longer than the trained one."""

from attnkit.inference.methods import POSITIONS
from attnkit.inference.positions.static import NTK, PI, YaRN

__all__ = ["NTK", "PI", "YaRN"]

for _method in (PI, NTK, YaRN):
    POSITIONS.register(_method.name, _method)
