"""Tile sizes of the kernels of recurrences in chunks: rows and columns of a tile, warps, stages.

Of `walk` they are rows and columns of a tile of the state. The width that picks them is that of keys.
"""

from attnkit._core.triton.configs import WIDTHS, ConfigTable, by_width

__all__ = ["CONFIGS", "LONGEST_CHUNK", "WIDEST"]

WIDEST = WIDTHS[-1]  # of keys, which a program holds whole
LONGEST_CHUNK = 512  # whose gates a program holds


# Those of 16 bits were measured on an H100. With 64 rows and keys of width 16 Triton 3.6 makes a wrong d_keys there (values
# 24 wide, grouped heads); 32 rows go through other matrix instructions.
# (rows, columns, warps, stages) for widths        16               32               64               128              256
_DEFAULT = (
    by_width("walk", 16, (16, 64, 4, 3), (32, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 3), (64, 128, 4, 3))
    | by_width("walk", 32, (16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2))
    | by_width("outputs", 16, (32, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 2))
    | by_width("outputs", 32, (32, 64, 8, 1), (32, 64, 8, 1), (32, 64, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1))
    | by_width("d_queries", 16, (32, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2))
    | by_width("d_queries", 32, (32, 64, 8, 1), (32, 64, 8, 1), (32, 64, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1))
    | by_width("d_keys", 16, (32, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2))
    | by_width("d_keys", 32, (32, 64, 8, 1), (32, 64, 8, 1), (32, 64, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1))
    | by_width("d_values", 16, (32, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 128, 4, 2), (64, 128, 4, 2))
    | by_width("d_values", 32, (32, 64, 8, 1), (32, 64, 8, 1), (32, 64, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1))
)
CONFIGS = ConfigTable("chunkwise", _DEFAULT, {})
