"""The backward pass of tiled attention, with its roundings."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnkit._core.errors import UnsupportedError
from attnkit.lab.numerics.problem import Problem
from attnkit.lab.numerics.recurrences import Emulation, Result, forward

__all__ = ["EmulatedAttention"]


class EmulatedAttention(torch.autograd.Function):
    """out, lse and rescales of grouped float64 inputs; only `out` has a gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, problem: Problem, emulation: Emulation) -> Any:
        """Run the algorithm and keep what its backward pass reads: the stored output, and for "delta" its second half."""
        result: Result = forward(emulation, problem)
        ctx.problem, ctx.emulation = problem, emulation
        low = emulation.round("O_out", result.rest) if emulation.stable == "delta" else None
        ctx.save_for_backward(q, k, v, result.out, result.lse, low)
        ctx.mark_non_differentiable(result.lse, result.rescales)
        return result.out, result.lse, result.rescales

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of q, k and v, each a sum over tiles."""
        emulation: Emulation = ctx.emulation
        for site in ("S", "S_scale", "P") if emulation.algorithm == "baseline" else ("S", "S_scale"):
            rounding = emulation.policy.sites.get(site)
            if rounding is not None and rounding.mode == "sr":
                raise UnsupportedError(
                    f"site {site} rounds stochastically, and the backward pass would draw again; use another mode there"
                )
        q, k, v, *results = ctx.saved_tensors
        return *_backward(emulation, dataclasses.replace(ctx.problem, q=q, k=k, v=v), grads[0], *results), None, None


def _backward(
    emulation: Emulation, problem: Problem, grad: Tensor, out: Tensor, lse: Tensor, low: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = problem.q, problem.k, problem.v
    base = lse.masked_fill(torch.isneginf(lse), 0)
    dq = torch.zeros_like(query)
    dk, dv = (t.new_zeros(*query.shape[:3], *t.shape[3:]) for t in (key, value))
    exact = emulation.stable == "exact_delta" or emulation.algorithm == "baseline"  # the gradient of softmax itself
    for start in range(0, problem.rows, emulation.block_q):
        rows = slice(start, min(start + emulation.block_q, problem.rows))
        here = grad[..., rows, :]
        if exact:
            delta = torch.zeros_like(base[..., rows, :])
            for keys in emulation.tiles(problem, rows):
                p, dp = _tile(emulation, problem, base, here, rows, keys)
                delta = delta + (p * dp).sum(-1, keepdim=True)
        else:
            known = out if low is None else out + low
            delta = (here * known[..., rows, :]).sum(-1, keepdim=True)
        delta = emulation.round("delta", delta)
        for keys in emulation.tiles(problem, rows):
            p, dp = _tile(emulation, problem, base, here, rows, keys)
            ds = emulation.round("dS", p * (dp - delta))
            p = emulation.round("P", p)
            dq[..., rows, :] = _add(emulation, "dQ_acc", dq[..., rows, :], ds, key[..., keys, :])
            dk[..., keys, :] = _add(emulation, "dK_acc", dk[..., keys, :], ds.transpose(-1, -2), query[..., rows, :])
            dv[..., keys, :] = _add(emulation, "dV_acc", dv[..., keys, :], p.transpose(-1, -2), here)
    dk, dv = (t.sum(2, keepdim=True) for t in (dk, dv))
    stored = [emulation.round("grad_out", t) for t in (problem.scale * dq, problem.scale * dk, dv)]
    return stored[0], stored[1], stored[2]


def _tile(
    emulation: Emulation, problem: Problem, base: Tensor, grad: Tensor, rows: slice, keys: slice
) -> tuple[Tensor, Tensor]:
    """Probabilities of a tile, made again from the log-sum-exp (the baseline has stored them), and their gradients."""
    p = torch.exp(emulation.scores(problem, rows, keys) - base[..., rows, :])
    if emulation.algorithm == "baseline":
        p = emulation.round("P", p)
    return p, emulation.round("dP", emulation.dot(grad, problem.v[..., keys, :].transpose(-1, -2)))


def _add(emulation: Emulation, site: str, total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return emulation.round(site, total + emulation.dot(a, b))
