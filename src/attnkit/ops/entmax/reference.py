"""Entmax by its definition: bisection for the threshold, and one differentiable Newton step for its gradient."""

import torch
from torch import Tensor

__all__ = ["bisect", "dense_entmax"]

STEPS = 80


def bisect(z: Tensor, alpha: Tensor | float) -> Tensor:
    """Thresholds [..., 1] of z = (alpha - 1) * scores by halving [top - 1, top]; +inf where a row holds nothing."""
    top = z.amax(-1, keepdim=True) if z.shape[-1] else z.new_full((*z.shape[:-1], 1), -torch.inf)
    empty = torch.isneginf(top)
    low, high = top - 1, top
    for _ in range(STEPS):
        middle = (low + high) / 2
        above = _probabilities(z, middle, alpha).sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return ((low + high) / 2).masked_fill(empty, torch.inf)


def dense_entmax(x: Tensor, alpha: Tensor | float) -> tuple[Tensor, Tensor]:
    """Probabilities and thresholds [..., 1] of scores along the last dimension, differentiable by autograd alone.

    The threshold of the bisection is a constant; a Newton step from it moves nothing but has the derivative of the root.
    """
    if not isinstance(alpha, Tensor) and alpha == 1:
        empty = torch.isneginf(x).all(-1, keepdim=True)
        prob = torch.softmax(x.masked_fill(empty, 0), -1).masked_fill(empty, 0)
        return prob, torch.logsumexp(x, -1, keepdim=True).masked_fill(empty, torch.inf)
    z = (alpha - 1) * x.masked_fill(torch.isneginf(x), 0)  # 0 * inf would be the gradient of alpha
    z = z.masked_fill(torch.isneginf(x), -torch.inf)
    top = z.detach().amax(-1, keepdim=True) if z.shape[-1] else z.new_full((*z.shape[:-1], 1), -torch.inf)
    empty = torch.isneginf(top)
    shift = top.masked_fill(empty, 0).masked_fill(torch.isposinf(top), torch.nan)
    v = z - shift
    with torch.no_grad():
        tau = bisect(v, alpha).masked_fill(empty, 0)
        r = 1 / (alpha - 1)
        inside = v > tau
        u = torch.where(inside, v - tau, 1)
        slope = (r * u ** (r - 1)).masked_fill(~inside, 0).sum(-1, keepdim=True)
    tau = tau + (_probabilities(v, tau, alpha).sum(-1, keepdim=True) - 1).masked_fill(empty, 0) / slope.masked_fill(empty, 1)
    return _probabilities(v, tau, alpha).masked_fill(empty, 0), (tau + shift).masked_fill(empty, torch.inf)


def _probabilities(z: Tensor, tau: Tensor, alpha: Tensor | float) -> Tensor:
    outside = ~(z > tau) & ~torch.isnan(z)
    u = (z - tau).masked_fill(outside, 1)  # a power of 0 has no derivative by its exponent
    return (u ** (1 / (alpha - 1))).masked_fill(outside, 0)
