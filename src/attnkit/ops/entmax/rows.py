"""Entmax of the rows of a matrix in plain torch, forward and backward, a chunk of rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit.ops.entmax.solver import Threshold, powers, solve

__all__ = ["backward", "forward", "gradients", "thresholds"]

CHUNK = 1 << 22  # elements that are worked on at once


def forward(x: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    """Probabilities [R, n] of scores [R, n]; `alphas` [R, 1], where given, stands for `alpha`."""
    prob = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in _chunks(x):
        z, found, own = _solved(x, rows, alphas, alpha)
        prob[rows] = powers(z - found.shift, found.place, own)[0].to(x.dtype)
    return prob


def thresholds(x: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    """tau [R, 1] of z = (alpha - 1) * x, in the accumulation dtype."""
    tau = x.new_empty(x.shape[0], 1, dtype=accumulator_dtype(x.dtype))
    for rows in _chunks(x):
        tau[rows] = _solved(x, rows, alphas, alpha)[1].tau
    return tau


def backward(d_prob: Tensor, prob: Tensor, alphas: Tensor | None, alpha: float, need_alphas: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and of alphas (empty where not needed)."""
    d_x = torch.empty_like(prob)
    d_alphas = prob.new_empty(0)
    if need_alphas and alphas is not None:
        d_alphas = torch.empty_like(alphas)
    for rows in _chunks(prob):
        own = alpha if alphas is None else alphas[rows]
        wide, wide_prob = (t[rows].to(accumulator_dtype(prob.dtype)) for t in (d_prob, prob))
        d_x[rows], d_own = gradients(wide, wide_prob, own, need_alphas)
        if d_own is not None:
            d_alphas[rows] = d_own.to(d_alphas.dtype)
    return d_x, d_alphas


def gradients(d_prob: Tensor, prob: Tensor, alpha: float | Tensor, need_alpha: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of scores [..., n] and of each row's alpha [..., 1], from the probabilities.

    With u = p^(2 - alpha) on the support and q = u / sum u, dx = u * (dp - q . dp); and with h = p log p,
    d_alpha = dp . [(p - q) / (alpha - 1)^2 - (h - q sum h) / (alpha - 1)]. For alpha near 1 p and q are almost the same, and
    their difference comes from what u and p differ by.
    """
    outside = prob == 0  # and a NaN is inside
    d_prob = d_prob.masked_fill(outside, 0)
    log = torch.log(prob.masked_fill(outside, 1))
    u = torch.exp((2 - alpha) * log).masked_fill(outside, 0)
    total = u.sum(-1, keepdim=True)
    mean = (u * d_prob).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)
    if not need_alpha:
        return u * (d_prob - mean), None
    h, decay = prob * log, (1 - alpha) * log  # p^(1 - alpha) = exp(decay)
    log_total = torch.log1p((prob * torch.expm1(decay)).sum(-1, keepdim=True))
    apart = -prob * torch.expm1(decay - log_total)  # p - q
    slope = apart / (alpha - 1) - h + (prob - apart) * h.sum(-1, keepdim=True)
    return u * (d_prob - mean), (d_prob * slope).sum(-1, keepdim=True) / (alpha - 1)


def _solved(x: Tensor, rows: slice, alphas: Tensor | None, alpha: float) -> tuple[Tensor, Threshold, float | Tensor]:
    own = alpha if alphas is None else alphas[rows]
    z = x[rows].to(accumulator_dtype(x.dtype)) * (own - 1)
    return z, solve(lambda: (z,), own), own


def _chunks(x: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, x.shape[1]))
    return (slice(start, start + step) for start in range(0, x.shape[0], step))
