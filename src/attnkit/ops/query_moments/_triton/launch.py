"""Launching the kernel of query moments. No host synchronisation."""

import torch
from torch import Tensor

from attnkit._core.triton.configs import by_width
from attnkit._core.triton.launcher import launch, power_of_two, precision
from attnkit.ops.query_moments._triton import kernels
from attnkit.ops.query_moments.tokens import counted, turns

__all__ = ["moments"]

# tokens of a tile, channels of a block, warps, stages, for widths 16, 32, 64, 128, 256; without matrix units blocks are small
_TILES = by_width("gather", 16, (128, 16, 4, 2), (128, 32, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 2)) | by_width(
    "gather", 32, (32, 16, 4, 2), (32, 32, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2)
)
_TILE = max(config.block_m for config in _TILES.values())
_PART = 2048  # tokens of a program: whatever the batch, so that a row gives the same alone


def moments(
    q: Tensor,
    inv_freq: Tensor | None,
    positions: Tensor | None,
    interleaved: bool,
    real: Tensor | None,
    skip: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """count [B], sums [B, H, D] and products [B, H, D, D] in float32; parts of a row are added up in their order."""
    near = q.stride(1) < 2**31 // _TILE  # offsets within a tile are 32 bits wide
    q = q if q.stride(3) == 1 and near else q.contiguous()
    batch, tokens, heads, width = q.shape
    count, taken = counted(q, real, skip)
    parts = -(-tokens // _PART)
    sums = q.new_empty(parts, batch, heads, width, dtype=torch.float32)
    products = q.new_empty(parts, batch, heads, width, width, dtype=torch.float32)
    if sums.numel():
        cos, sin = None, None
        if inv_freq is not None and positions is not None and len(inv_freq):
            cos, sin = turns(inv_freq, positions, torch.float32)
        config = _TILES["gather", 8 * q.element_size(), power_of_two(width, 16)]
        each = 0 if cos is None or cos.shape[0] == 1 else cos.stride(0)  # whether rows of the batch have positions of their own
        arguments = (
            q, cos, sin, None if taken is None else taken.contiguous().view(torch.uint8),
            None if shift is None else shift.contiguous(), sums, products, tokens, heads, _PART, *q.stride()[:3], each,
        )  # fmt: skip
        flags = {
            "INTERLEAVED": interleaved and cos is not None,
            "SPLIT": q.element_size() == 2 and (cos is not None or shift is not None),
            "PRECISION": precision(),
            "WIDTH": width,
            "TURNS": 0 if cos is None else cos.shape[2],
            "BLOCK_N": config.block_m,
            "BLOCK_D": config.block_n,
        }
        blocks = -(-width // config.block_n)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        launch(kernels.gather, (batch * heads, parts, blocks**2), arguments, flags, **options)
    whole = products.sum(0)
    return count, sums.sum(0), whole + whole.mT
