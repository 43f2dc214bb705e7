"""The prepared call that the backends of query moments judge and run."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS, accumulator_dtype, check_dtype, dims
from attnkit._core.errors import DTypeError, InputError, ShapeError, UnsupportedError

__all__ = ["MomentsCall", "prepare"]


@dataclass
class MomentsCall:
    """Checked arguments of `query_moments`.

    Attributes:
        q: [B, T, H, D].
        inv_freq: [R / 2] float, or None where queries were not rotated.
        positions: [B or 1, T] integers, with `inv_freq`.
        interleaved: as given.
        real: [B, T] bool, or None where all tokens are.
        skip: [B] integers, or None where no real token is left out.
        shift: [B, H, D] in the accumulation dtype, or None for 0.
    """

    q: Tensor
    inv_freq: Tensor | None
    positions: Tensor | None
    interleaved: bool
    real: Tensor | None
    skip: Tensor | None
    shift: Tensor | None


def prepare(
    q: Tensor,
    *,
    inv_freq: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
    real: Tensor | None = None,
    skip: Tensor | None = None,
    shift: Tensor | None = None,
) -> MomentsCall:
    """Check the arguments of `query_moments` (its docstring says what is raised)."""
    given: dict[str, tuple[Tensor, str]] = {"q": (q, "B T H D")}
    if positions is not None:
        given["positions"] = (positions, "T" if positions.dim() == 1 else "B T")
    for name, tensor, pattern in (("real", real, "B T"), ("skip", skip, "B"), ("shift", shift, "B H D")):
        if tensor is not None:
            given[name] = (tensor, pattern)
    width = dims(**given)["D"]
    if width == 0:
        raise ShapeError("q has heads of width 0")
    if (positions is None) != (inv_freq is None):
        raise InputError("positions and inv_freq go together: the one says how far, the other how fast queries were turned")
    if inv_freq is not None and (inv_freq.dim() != 1 or 2 * len(inv_freq) > width):
        raise ShapeError(
            f"inv_freq has shape {tuple(inv_freq.shape)}; expected one number for each of at most {width // 2} pairs"
        )
    check_dtype("q", q, *FLOATS)
    if inv_freq is not None:
        check_dtype("inv_freq", inv_freq, *FLOATS)
    if real is not None:
        check_dtype("real", real, torch.bool)
    if shift is not None:
        check_dtype("shift", shift, accumulator_dtype(q.dtype))
    others = (("inv_freq", inv_freq), ("positions", positions), ("real", real), ("skip", skip), ("shift", shift))
    for name, other in others:
        if other is not None and other.device != q.device:
            raise InputError(f"{name} is on {other.device} but q is on {q.device}; move one of them")
        if name in ("positions", "skip") and other is not None and (other.is_floating_point() or other.dtype == torch.bool):
            raise DTypeError(f"{name} is {str(other.dtype).removeprefix('torch.')}; expected integers")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, inv_freq, shift)):
        raise UnsupportedError("query moments have no gradients; call them under torch.no_grad()")
    if positions is not None and positions.dim() == 1:
        positions = positions[None]
    return MomentsCall(q, inv_freq, positions, bool(interleaved), real, skip, shift)
