"""The prepared call that the backends of entmax judge and run."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS, accumulator_dtype, check_dtype
from attnkit._core.errors import OptionError, ShapeError

__all__ = ["EntmaxCall", "check_alpha", "prepare"]


@dataclass
class EntmaxCall:
    """Scores as the rows of a matrix.

    Attributes:
        rows: [R, n], what is masked is -inf; in the accumulation dtype where an alpha is learned, whose gradient would be lost
            in 16-bit probabilities.
        alphas: [R, 1] in the accumulation dtype where alpha is a tensor.
        alpha: where it is a number; 1 means softmax.
        shape: of the scores with their dimension moved to the end.
        dim: where that dimension was.
        dtype: of the scores, and of the result.
    """

    rows: Tensor
    alphas: Tensor | None
    alpha: float
    shape: torch.Size
    dim: int
    dtype: torch.dtype

    def restore(self, rows: Tensor) -> Tensor:
        """Rows [R, m] -> the shape of the scores, with m in place of their dimension."""
        return rows.reshape(*self.shape[:-1], rows.shape[-1]).movedim(-1, self.dim)


def check_alpha(alpha: float | Tensor) -> float | Tensor:
    """Refuse what entmax is not defined or not computed for; values of tensors are read on the CPU only.

    Raises:
        OptionError: a number outside [1, 2], or a tensor with values outside (1, 2].
        DTypeError: a tensor of integers.
    """
    if not isinstance(alpha, Tensor):
        alpha = float(alpha)
        if math.isnan(alpha) or not 1 <= alpha <= 2:
            raise OptionError(f"alpha={alpha:g} is outside 1..2: 1 is softmax, 2 is sparsemax")
        return alpha
    check_dtype("alpha", alpha, *FLOATS)
    if alpha.device.type == "cpu" and not torch.compiler.is_compiling() and alpha.numel():
        low, high = float(alpha.detach().min()), float(alpha.detach().max())
        if not (low > 1 and high <= 2):  # a NaN is refused too
            raise OptionError(
                f"alpha ranges over {low:g}..{high:g}; a tensor of alphas must lie above 1 and not above 2 (give the number 1 "
                f"for softmax)"
            )
    return alpha


def prepare(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, *, mask: Tensor | None = None) -> EntmaxCall:
    """Check the arguments of `entmax` (its docstring says what is raised)."""
    check_dtype("x", x, *FLOATS)
    if x.dim() == 0:
        raise ShapeError("x is a single number; entmax needs a dimension to work along")
    if not -x.dim() <= dim < x.dim():
        raise OptionError(f"dim={dim} does not exist; x has {x.dim()} dimensions")
    if mask is not None:
        check_dtype("mask", mask, torch.bool)
        _check_fits("mask", mask, x)
        x = x.masked_fill(~mask, -torch.inf)
    dim = dim % x.dim()
    alpha = check_alpha(alpha)
    alphas = None
    if isinstance(alpha, Tensor):
        _check_fits("alpha", alpha, x)
        if alpha.device != x.device and alpha.dim():
            raise OptionError(f"alpha is on {alpha.device} but x is on {x.device}; move one of them")
        full = alpha.to(x.device, accumulator_dtype(x.dtype))
        full = full[(None,) * (x.dim() - alpha.dim())]
        if full.shape[dim] != 1:
            raise ShapeError(
                f"alpha has shape {tuple(alpha.shape)}; along dim={dim} a row has one alpha, so it must be 1 there"
            )
        shape = [1 if d == dim else size for d, size in enumerate(x.shape)]
        alphas = full.expand(shape).movedim(dim, -1).reshape(-1, 1)
        alpha = 0.0
    moved = x.movedim(dim, -1)
    rows = moved.reshape(moved.shape[:-1].numel(), moved.shape[-1])
    if alphas is not None and alphas.requires_grad:
        rows = rows.to(alphas.dtype)
    return EntmaxCall(rows, alphas, alpha, moved.shape, dim, x.dtype)


def _check_fits(name: str, tensor: Tensor, x: Tensor) -> None:
    sizes = zip(reversed(tensor.shape), reversed(x.shape), strict=False)
    if tensor.dim() > x.dim() or any(size not in (1, wanted) for size, wanted in sizes):
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to that of x, {tuple(x.shape)}")
