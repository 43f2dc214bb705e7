"""Random inputs that are drawn piece by piece, so that they take little more memory than they are."""

import torch
from torch import Tensor

__all__ = ["normal"]

PIECES = 16  # of the first dimension


def normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Normal random numbers on the generator's device, drawn in float32 and rounded."""
    drawn = torch.empty(shape, dtype=dtype, device=generator.device)
    for piece in drawn.chunk(PIECES):
        piece.copy_(torch.randn(piece.shape, generator=generator, device=generator.device))
    return drawn
