"""What tests of the numerics lab share."""

import torch
from torch import Tensor

from attnkit.lab.numerics.formats import FloatFormat, round_to

SEEDS = 8


def identical(got: Tensor, expected: Tensor) -> bool:
    """The same bits, signs of zeros included; any NaN is as good as another."""
    got, expected = got.double(), expected.double()
    same = got.view(torch.int64) == expected.view(torch.int64)
    return bool((same | (got.isnan() & expected.isnan())).all())


def drawn(
    fmt: FloatFormat, rows: int, keys: int | None = None, *, heads: tuple[int, int] = (1, 1), width: int = 32, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal inputs that are numbers of the format, in float64. A batch of SEEDS is as many independent samples."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, heads[0]), (keys or rows, heads[1]), (keys or rows, heads[1]))
    q, k, v = (
        round_to(torch.randn(batch, length, count, width, generator=generator, dtype=torch.float64), fmt)
        for length, count in shapes
    )
    return q, k, v


def rms(out: Tensor, golden: Tensor) -> Tensor:
    """Root mean square error of each batch element, [B]."""
    return (out - golden).square().flatten(1).mean(1).sqrt()
