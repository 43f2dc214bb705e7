"""Tile sizes of the attention kernels."""

from attnkit._core.triton.configs import Config, ConfigTable, Key

__all__ = ["CONFIGS"]

_WIDTHS = (16, 32, 64, 128, 256)


def _by_width(kernel: str, bits: int, *configs: tuple[int, int, int, int]) -> dict[Key, Config]:
    """One configuration (rows, keys, warps, stages) for each width 16, 32, 64, 128, 256."""
    return {(kernel, bits, width): Config(*config) for width, config in zip(_WIDTHS, configs, strict=True)}


# (rows, keys, warps, stages) for widths           16               32               64               128              256
_DEFAULT = (
    _by_width("fwd", 16, (128, 64, 4, 2), (128, 64, 4, 2), (128, 64, 4, 2), (128, 32, 4, 2), (64, 32, 4, 2))
    | _by_width("fwd", 32, (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 1))
    | _by_width("decode", 16, (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2))
    | _by_width("decode", 32, (16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1))
    | _by_width("bwd_dq", 16, (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1))
    | _by_width("bwd_dq", 32, (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1))
    | _by_width("bwd_dkdv", 16, (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 1))
    | _by_width("bwd_dkdv", 32, (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1))
)
# Measured on an H100 by `attnkit tune`. In fp32 at width 256 larger backward tiles are 10 to 15 % faster and take 4 s more
# to compile.
_HOPPER = (
    _by_width("fwd", 16, (64, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (128, 32, 8, 3))
    | _by_width("fwd", 32, (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 1), (32, 64, 8, 2), (32, 64, 8, 2))
    | _by_width("decode", 16, (16, 128, 2, 4), (16, 128, 4, 4), (16, 128, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3))
    | _by_width("decode", 32, (16, 64, 2, 3), (16, 64, 2, 3), (16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2))
    | _by_width("bwd_dq", 16, (64, 64, 4, 3), (64, 128, 4, 4), (64, 128, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3))
    | _by_width("bwd_dq", 32, (64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2), (16, 16, 4, 1))
    | _by_width("bwd_dkdv", 16, (128, 64, 4, 4), (128, 64, 4, 3), (64, 64, 4, 3), (32, 64, 4, 3), (64, 64, 8, 2))
    | _by_width("bwd_dkdv", 32, (64, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1))
)
CONFIGS = ConfigTable("attention", _DEFAULT, {(9, 0): _HOPPER})
