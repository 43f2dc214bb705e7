"""Entmax attention in plain torch, tile by tile, forward and backward.

Tiles of rows and their runs of keys are those of a `Plan`. The threshold of a tile of rows takes several walks over its
scores: up to `CACHED` keys these are kept, else computed again in each walk, so that memory beyond the inputs is about one
tile of scores. What the backward pass keeps of a row is tau and O2 = sum_j U_j v_j / sum_j U_j, where U = p^(2 - alpha):
dO . O2 is the mean of dP that its scores' gradients U (dP - mean) are relative to.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnkit.ops.attention.problem import Problem, Runs
from attnkit.ops.entmax.solver import powers, powers_at, solve

__all__ = ["BLOCK_Q", "TileScores", "backward", "exponents", "forward"]

BLOCK_Q, BLOCK_K = 64, 512
CACHED = 4096


def exponents(p: Problem, alphas: Tensor | None, alpha: float) -> float | Tensor:
    """alpha, or alphas [H] as [Hkv, G, 1, 1] beside tiles of scores."""
    return alpha if alphas is None else alphas.to(p.acc).view(p.kv_heads, p.group, 1, 1)


@dataclass
class TileScores:
    """z = (alpha - 1) * scores of a tile of rows, one run of keys after the other, the same numbers in every walk.

    Attributes:
        q: scaled queries [B, Hkv, G, rows, D].
        cached: whether a second walk finds the scores of the first; then z must not be changed in place.
    """

    p: Problem
    q: Tensor
    rows: slice
    runs: Runs
    alpha: float | Tensor
    cached: bool = True
    _kept: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cached = self.cached and self.runs[-1][0].stop - self.runs[0][0].start <= CACHED

    def walk(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each run's keys and z [B, Hkv, G, rows, keys]."""
        known = len(self._kept)
        for i, (keys, masked) in enumerate(self.runs):
            if i < known:
                yield keys, self._kept[i]
                continue
            z = self.p.scores(self.q, self.rows, keys, masked)[0] * (self.alpha - 1)
            if self.cached:
                self._kept.append(z)
            yield keys, z

    def blocks(self) -> Iterable[Tensor]:
        """The scores alone."""
        return (z for _, z in self.walk())


def forward(p: Problem, alphas: Tensor | None, alpha: float, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """out [B, T, H, Dv], tau [B, T, H] in units of z, and O2 [B, T, H, Dv] where it is to be kept.

    Rows that see nothing give 0, +inf and 0.
    """
    batch, num_q, heads, _ = p.q.shape
    own = exponents(p, alphas, alpha)
    out = p.q.new_zeros(batch, num_q, heads, p.v.shape[3])
    second = torch.zeros_like(out) if keep else None
    tau = p.q.new_full((batch, num_q, heads), torch.inf, dtype=p.acc)
    out_view, tau_view = p.grouped(out), p.grouped(tau[..., None])
    second_view = None if second is None else p.grouped(second)
    for rows, runs in p.tiles(BLOCK_K):
        if not runs:
            continue
        scores = TileScores(p, p.queries(rows), rows, runs, own)
        found = solve(scores.blocks, own)
        wide, total = found.top.new_zeros(*found.top.shape[:-1], p.v.shape[3]), torch.zeros_like(found.top)
        wide_second = torch.zeros_like(wide)
        for keys, z in scores.walk():
            prob, u, _ = powers(z - found.shift, found.place, own)
            wide += _product(prob, p.values[:, :, keys])
            if keep:
                wide_second += _product(u, p.values[:, :, keys])
                total += u.sum(-1, keepdim=True)
        out_view[..., rows, :], tau_view[..., rows, :] = wide.to(out.dtype), found.tau
        if second_view is not None:
            second_view[..., rows, :] = (wide_second / total.masked_fill(total == 0, 1)).to(out.dtype)
    return out, tau, second


def backward(
    p: Problem, alphas: Tensor | None, alpha: float, d_out: Tensor, tau: Tensor, second: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and alphas (an empty tensor where absent), scores recomputed, probabilities from tau."""
    p.keys, p.values = p.keys.contiguous(), p.values.contiguous()  # every tile reads them again
    own = exponents(p, alphas, alpha)
    d_q = torch.zeros_like(p.q, memory_format=torch.contiguous_format)
    d_keys, d_values = torch.zeros_like(p.keys), torch.zeros_like(p.values)
    delta = (d_out.to(p.acc) * second.to(p.acc)).sum(-1, keepdim=True)
    d_q_view, tau_view, d_out_view, delta_view = (p.grouped(t) for t in (d_q, tau[..., None], d_out, delta))
    d_own = torch.zeros_like(own) if isinstance(own, Tensor) else None
    for rows, runs in p.tiles(BLOCK_K):
        q, d_o, row_tau = p.queries(rows), d_out_view[..., rows, :].to(p.acc), tau_view[..., rows, :]
        d_q_tile = torch.zeros_like(q)
        slopes = AlphaSlopes(own) if isinstance(own, Tensor) else None
        for keys, masked in runs:
            s, softcap_slope = p.scores(q, rows, keys, masked)
            prob, u, _ = powers_at(s * (own - 1), row_tau, own)
            d_prob = _product(d_o, p.values[:, :, keys].transpose(-1, -2))
            if slopes is not None:
                slopes.add(prob, u, d_prob)
            d_s = d_prob.sub_(delta_view[..., rows, :]).mul_(u)
            d_s = (d_s if softcap_slope is None else d_s * softcap_slope).flatten(2, 3)
            d_q_tile += (d_s @ p.keys[:, :, keys]).view_as(q)
            d_keys[:, :, keys] += d_s.transpose(-1, -2) @ q.flatten(2, 3)
            d_values[:, :, keys] += prob.flatten(2, 3).transpose(-1, -2) @ d_o.flatten(2, 3)
        d_q_view[..., rows, :] = (d_q_tile * p.scale).to(d_q.dtype)
        if slopes is not None and d_own is not None and runs:
            d_own += slopes.result().sum((0, 3), keepdim=True)[0]
    d_k, d_v = (t.transpose(1, 2).contiguous().to(p.k.dtype) for t in (d_keys, d_values))
    d_alphas = p.q.new_empty(0) if alphas is None or d_own is None else d_own.view(-1).to(alphas.dtype)
    return d_q, d_k, d_v, d_alphas


class AlphaSlopes:
    """The derivative of rows by their alpha, from sums over runs of keys.

    With q = U / sum U and h = p log p:
    sum dP (p - q) / (alpha - 1)^2 - (sum dP h - (sum dP q) (sum h)) / (alpha - 1).
    The mean sum dP q is summed here and not taken from O2, whose rounding 1 / (alpha - 1)^2 would magnify.
    """

    def __init__(self, alpha: Tensor) -> None:
        self.alpha = alpha
        self.sums: Tensor | None = None

    def add(self, prob: Tensor, u: Tensor, d_prob: Tensor) -> None:
        """Take in a run of keys."""
        h = torch.special.xlogy(prob, prob)
        new = torch.stack([t.sum(-1, keepdim=True) for t in (d_prob * prob, d_prob * u, u, d_prob * h, h)])
        self.sums = new if self.sums is None else self.sums + new

    def result(self) -> Tensor:
        """[B, Hkv, G, rows, 1]."""
        assert self.sums is not None
        along_p, along_u, total, along_h, sum_h = self.sums
        mean = along_u / total.masked_fill(total == 0, 1)
        slope: Tensor = ((along_p - mean) / (self.alpha - 1) - along_h + mean * sum_h) / (self.alpha - 1)
        return slope


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[B, Hkv, G, rows, x] @ [B, Hkv, x, y] as one matrix product for all heads of a group."""
    product: Tensor = (a.flatten(2, 3) @ b).unflatten(2, a.shape[2:4])
    return product
