"""The forward pass of each algorithm, with its roundings, on one run of rows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnkit.lab.numerics.policy import SitePolicy
from attnkit.lab.numerics.problem import Problem, softmax
from attnkit.lab.numerics.shift import Shift

__all__ = ["ALGORITHMS", "Algorithm", "Emulation", "Result", "forward"]

Algorithm = Literal["baseline", "fa1", "fa2", "lagged"]
ALGORITHMS: tuple[Algorithm, ...] = ("baseline", "fa1", "fa2", "lagged")

_TILE_ELEMENTS = 2**17  # scores of a step: what stays in a cache
_ROW_ELEMENTS = 2**20


@dataclass(frozen=True)
class Emulation:
    """What is emulated; `emulated_attention` says what each part means."""

    algorithm: Algorithm
    policy: SitePolicy
    block_q: int
    block_k: int
    consistent: bool
    stable: str
    shift: Shift | None
    tie_eps: float
    lag: float
    reverse: bool
    generator: torch.Generator | None

    def round(self, site: str, x: Tensor) -> Tensor:
        """Round a tensor of that site."""
        return self.policy.round(site, x, self.generator)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply matrices."""
        return self.policy.dot(a, b, self.generator)

    def tiles(self, problem: Problem, rows: slice) -> Iterator[slice]:
        """Tiles of keys that some of the rows see, in the order in which they are visited."""
        starts = range(0, problem.reach(rows), self.block_k)
        for start in reversed(starts) if self.reverse else starts:
            yield slice(start, min(start + self.block_k, problem.keys))

    def scores(self, problem: Problem, rows: slice, keys: slice) -> Tensor:
        """Scores of a tile, -inf where a row must not see a key."""
        products = self.round("S", self.dot(problem.q[..., rows, :], problem.k[..., keys, :].transpose(-1, -2)))
        return problem.hide(self.round("S_scale", products * problem.scale), rows, keys)

    def maximum(self, scores: Tensor) -> Tensor:
        """What a tile proposes to subtract from each row, [..., rows, 1]."""
        top = scores.amax(-1, keepdim=True)
        if self.shift is None:
            return top
        ties = ((scores >= top - self.tie_eps) & torch.isfinite(scores)).sum(-1, keepdim=True)
        return self.shift(top, ties)

    def total(self, p: Tensor) -> Tensor:
        """Row sums of a tile, [..., rows, 1]."""
        return self.dot(p, p.new_ones(p.shape[-1], 1))


@dataclass(frozen=True)
class Result:
    """Of a run of rows, [B, Hkv, G, rows, *].

    Attributes:
        out: what is stored.
        rest: what storing it has cut off, in float64.
        lse: log-sum-exp that the backward pass uses, last width 1.
        rescales: how often older results were rescaled, last width 1.
    """

    out: Tensor
    rest: Tensor
    lse: Tensor
    rescales: Tensor


def forward(emulation: Emulation, problem: Problem) -> Result:
    """Run the algorithm on every row."""
    whole = emulation.algorithm == "baseline"
    width, elements = (problem.keys, _ROW_ELEMENTS) if whole else (emulation.block_k, _TILE_ELEMENTS)
    run = {"baseline": _baseline, "fa1": _normalised}.get(emulation.algorithm, _unnormalised)
    parts = [run(emulation, problem, rows) for rows in problem.row_slices(width, elements)]
    return Result(*(torch.cat([getattr(part, name) for part in parts], -2) for name in ("out", "rest", "lse", "rescales")))


def _baseline(emulation: Emulation, problem: Problem, rows: slice) -> Result:
    """All scores are stored, softmax is one operator, its result is stored and multiplied."""
    keys = slice(0, problem.keys)
    scores = emulation.scores(problem, rows, keys)
    p, total, lse = softmax(scores)
    out = emulation.dot(emulation.round("P", p / total), problem.v)
    return _store(emulation, out, lse, torch.zeros_like(lse))


def _unnormalised(emulation: Emulation, problem: Problem, rows: slice) -> Result:
    """FlashAttention-2 and later: the output is divided once, at the end. Lagged: small rises of the maximum are ignored."""
    state = _State(problem, rows)
    for keys in emulation.tiles(problem, rows):
        scores = emulation.scores(problem, rows, keys)
        proposed = emulation.maximum(scores)
        if emulation.algorithm == "lagged":
            rise = (proposed - state.m) / math.log(2)
            m = torch.where(rise > emulation.lag, proposed, state.m)
        else:
            m = torch.maximum(state.m, proposed)
        m = emulation.round("m", m)
        base = m.masked_fill(torch.isneginf(m), 0)
        p = torch.exp(emulation.round("X", scores - base))
        alpha = emulation.round("alpha", torch.exp(state.m - base))
        operand = emulation.round("P", p)
        summed = emulation.round("P_sum", p)
        state.mass = emulation.round("l", alpha * state.mass + emulation.total(summed))
        if emulation.consistent:
            state.l = emulation.round("l", alpha * state.l + emulation.total(operand))
        else:
            state.l = state.mass
        product = emulation.round("PV", emulation.dot(operand, problem.v[..., keys, :]))
        state.acc = emulation.round("O_acc", alpha * state.acc + product)
        state.advance(m)
    out = torch.where(state.l > 0, state.acc / state.l, 0)
    return _store(emulation, emulation.round("O_norm", out), state.lse(), state.rescales)


def _normalised(emulation: Emulation, problem: Problem, rows: slice) -> Result:
    """FlashAttention-1: the output is kept divided by the sum so far."""
    state = _State(problem, rows)
    for keys in emulation.tiles(problem, rows):
        scores = emulation.scores(problem, rows, keys)
        here = emulation.round("m", emulation.maximum(scores))
        m = torch.maximum(state.m, here)
        base, local = (t.masked_fill(torch.isneginf(t), 0) for t in (m, here))
        p = torch.exp(emulation.round("X", scores - local))
        older = emulation.round("alpha", torch.exp(state.m - base))
        newer = emulation.round("alpha", torch.exp(here - base))
        operand = emulation.round("P", p)
        summed = operand if emulation.consistent else emulation.round("P_sum", p)
        total = emulation.round("l", older * state.l + newer * emulation.total(summed))
        product = emulation.round("PV", emulation.dot(operand, problem.v[..., keys, :]))
        mixed = torch.where(total > 0, (state.l * older * state.acc + newer * product) / total, 0)
        state.acc, state.l, state.mass = emulation.round("O_acc", mixed), total, total
        state.advance(m)
    return _store(emulation, emulation.round("O_norm", state.acc), state.lse(), state.rescales)


class _State:
    """Running statistics and output of a run of rows.

    `l` divides the output, `mass` gives the log-sum-exp; they differ only where `l` sums rounded probabilities.
    """

    def __init__(self, problem: Problem, rows: slice) -> None:
        shape = (*problem.q.shape[:3], rows.stop - rows.start)
        self.m = problem.q.new_full((*shape, 1), -torch.inf)
        self.l = problem.q.new_zeros(*shape, 1)
        self.mass = self.l
        self.acc = problem.q.new_zeros(*shape, problem.v.shape[-1])
        self.rescales = self.l

    def advance(self, m: Tensor) -> None:
        """Take over a new maximum and count the rows whose older results it has rescaled."""
        self.rescales = self.rescales + ((m > self.m) & ~torch.isneginf(self.m))
        self.m = m

    def lse(self) -> Tensor:
        return self.m + torch.log(self.mass)


def _store(emulation: Emulation, out: Tensor, lse: Tensor, rescales: Tensor) -> Result:
    stored = emulation.round("O_out", out)
    return Result(stored, out - stored, lse, rescales)
