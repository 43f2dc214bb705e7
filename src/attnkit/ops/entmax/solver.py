"""The threshold of alpha-entmax, from blocks of a row that may be walked over several times.

p_i = [z_i - tau]_+^r with z = (alpha - 1) * scores and r = 1 / (alpha - 1); tau is where a row's p_i add up to one. It lies
in [top - 1, top - n^(1 - alpha)] for the row's maximum `top` and its n entries. Everything here works on v = z - top, and on
`place`, where tau lies from the end of [top - 1, top] that it is near to (`anchor`): from the lower one for alpha near 1, where
1 + v says nothing of a score, else from the upper one, where long rows of like scores have theirs. So neither the size of
scores nor the length of rows costs digits.

`alpha` is a number in (1, 2], or a tensor that broadcasts against [..., 1] and always takes the general form.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "BINS",
    "Bracket",
    "Threshold",
    "anchor",
    "begin",
    "count_bins",
    "powers",
    "powers_at",
    "solve",
    "start",
    "sums",
    "update",
]

Alpha = float | Tensor
Walk = Callable[[], Iterable[Tensor]]
BINS = 8
MAX_UPDATES = 64


@dataclass(frozen=True)
class Threshold:
    """The thresholds of rows, [..., 1] each.

    Attributes:
        top: the row's maximum of z, -inf where the row is empty.
        place: tau - top - `end`.
        end: `anchor` of the alpha.
        count: entries of the row above -inf.
        updates: how many updates the slowest row took.
    """

    top: Tensor
    place: Tensor
    end: Alpha
    count: Tensor
    updates: int

    @property
    def shift(self) -> Tensor:
        """What to take from z to get v: the maximum, 0 for empty rows, NaN where it is infinite."""
        return self.top.masked_fill(torch.isneginf(self.top), 0).masked_fill(torch.isposinf(self.top), torch.nan)

    @property
    def tau(self) -> Tensor:
        """The threshold in units of z; +inf for rows that hold nothing."""
        return (self.top + (self.place + self.end)).masked_fill(torch.isneginf(self.top), torch.inf)


@dataclass(frozen=True)
class Bracket:
    """Where to look next, and between which bounds the root of a row lies (up to rounding), all as places."""

    place: Tensor
    low: Tensor
    high: Tensor


def solve(walk: Walk, alpha: Alpha) -> Threshold:
    """Find the thresholds of rows whose z comes in blocks [..., rows, width], the same ones each time `walk` is called.

    A row stops at the update that no longer moves it, so that its result does not depend on the rows beside it.

    Args:
        walk: yields at least one block; masked entries are -inf, and a block may be empty.
        alpha: see the module.
    """
    top, count = _extent(walk)
    shift = top.masked_fill(torch.isneginf(top), 0)
    counts = None
    if not isinstance(alpha, Tensor) and alpha in (1.5, 2.0):
        counts = sum(count_bins(z - shift) for z in walk())
    state = begin(count, alpha, counts if isinstance(counts, Tensor) else None)
    end = anchor(alpha)
    unit = 4 * torch.finfo(top.dtype).eps * (alpha - 1)  # what moves no probability by more than its own rounding
    active = torch.isfinite(top) & (count > 0)
    updates = 0
    while updates < MAX_UPDATES and bool(active.any()):
        a0, a1, a2 = _add(sums(z - shift, state.place, alpha) for z in walk())
        new = update(state, a0, a1, a2, alpha)
        moved = active & ((new.place - state.place).abs() > unit * (new.place + end).abs())
        state = Bracket(torch.where(active, new.place, state.place), new.low, new.high)
        active, updates = moved, updates + 1
    return Threshold(top, state.place, end, count, updates)


def _extent(walk: Walk) -> tuple[Tensor, Tensor]:
    """Maximum and number of entries of each row, [..., 1]."""
    top = count = None
    for z in walk():
        new_top = z.amax(-1, keepdim=True) if z.shape[-1] else z.new_full((*z.shape[:-1], 1), -torch.inf)
        new_count = (z > -torch.inf).sum(-1, keepdim=True).to(z.dtype)
        top = new_top if top is None else torch.maximum(top, new_top)
        count = new_count if count is None else count + new_count
    assert top is not None
    assert count is not None
    return top, count


def _add(parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    total: tuple[Tensor, Tensor, Tensor] | None = None
    for part in parts:
        total = part if total is None else (total[0] + part[0], total[1] + part[1], total[2] + part[2])
    assert total is not None
    return total


def anchor(alpha: Alpha) -> Alpha:
    """The end of v's range that places are counted from: -1 for alpha below 1.25, else 0."""
    if isinstance(alpha, Tensor):
        return -(alpha < 1.25).to(alpha.dtype)
    return -1.0 if alpha < 1.25 else 0.0


def begin(count: Tensor, alpha: Alpha, counts: Tensor | None = None) -> Bracket:
    """The bracket before the first update: from the number of entries, and from a histogram where there is one.

    Args:
        count: [..., 1], entries of each row.
        counts: [..., bins] of `count_bins`; alpha must then be 1.5 or 2. None starts at the lower bound, from where the tangent
            alone converges, for alpha near 1 in a step or two.
    """
    decay = (1 - alpha) * torch.log(count.clamp(min=1))
    end = anchor(alpha)
    if isinstance(end, Tensor):
        low, high = (-1 - end).expand_as(decay), torch.where(end < 0, -torch.expm1(decay), -torch.exp(decay))
    else:
        low, high = torch.full_like(decay, -1 - end), -torch.expm1(decay) if end else -torch.exp(decay)
    if counts is None:
        return Bracket(low, low, high)
    assert not isinstance(alpha, Tensor)
    low = torch.minimum(start(counts.to(count.dtype), alpha).clamp(min=-1), high)  # an empty row has none
    high = torch.minimum(low + 1 / counts.shape[-1], high)
    return Bracket((low + high) / 2, low, high)


def count_bins(v: Tensor, bins: int = BINS) -> Tensor:
    """Histogram [..., bins] of v = z - top over [-1, 0]: bin j holds j / bins <= v + 1 < (j + 1) / bins, the last one 0 too."""
    y = v + 1
    at_least = torch.stack([(y >= j / bins).sum(-1) for j in range(bins)], -1)
    return torch.cat([at_least[..., :-1] - at_least[..., 1:], at_least[..., -1:]], -1)


def start(counts: Tensor, alpha: float) -> Tensor:
    """The threshold [..., 1], as tau - top, of a row whose entries lie at the lower edges of their bins, its maximum at 0.

    Moving entries down by less than 1 / bins moves the threshold down by less: the true one lies in [t, t + 1 / bins].
    The sums d1 and d2 of first and second powers above an edge are carried from bin to bin downwards; nothing is subtracted
    from anything larger, so that a million entries in one bin do no harm.

    Args:
        counts: [..., bins] of `count_bins`, in a floating dtype.
        alpha: 1.5 or 2.
    """
    step = 1 / counts.shape[-1]
    one = torch.ones_like(counts[..., :1])
    edge, n, d1, d2 = one, one, torch.zeros_like(one), torch.zeros_like(one)
    above: Tensor | None = None  # whether the threshold lies below the edge reached
    for j in reversed(range(counts.shape[-1])):
        next1, next2 = d1 + n * step, d2 + 2 * step * d1 + n * step**2
        below = (next2 if alpha == 1.5 else next1) < 1
        above = below if above is None else above & below
        joined = n + counts[..., j : j + 1] - (1 if j == counts.shape[-1] - 1 else 0)
        edge, n = torch.where(above, j * step, edge), torch.where(above, joined, n)
        d1, d2 = torch.where(above, next1, d1), torch.where(above, next2, d2)
    if alpha == 1.5:
        return (edge - 1) - (1 - d2) / (d1 + torch.sqrt(d1.square() + n * (1 - d2)))
    return (edge - 1) - (1 - d1) / n


def powers(v: Tensor, place: Tensor, alpha: Alpha) -> tuple[Tensor, Tensor, Tensor]:
    """u^r, u^(r - 1) and u^(r - 2) where u = z - tau is positive, else 0: p, what its gradient is made of, and curvature."""
    end = anchor(alpha)
    if not isinstance(end, Tensor) and end == 0:
        return powers_at(v, place, alpha)
    w = v - place
    if isinstance(end, Tensor):
        inside = w > end
        safe = torch.where(inside, w, 1 + end)  # what has the logarithm 0
        log_u = torch.where(end < 0, torch.log1p(safe), torch.log(torch.where(end < 0, 1, safe)))
    else:
        inside = w > -1
        log_u = torch.log1p(torch.where(inside, w, 0))
    return _general(log_u, inside, w, alpha)


def powers_at(z: Tensor, tau: Tensor, alpha: Alpha) -> tuple[Tensor, Tensor, Tensor]:
    """The same of u = z - tau."""
    u = z - tau
    if not isinstance(alpha, Tensor) and alpha in (1.5, 2.0):
        u = u.clamp_(min=0)
        inside = (u > 0).to(u.dtype) + 0 * u  # a NaN stays one
        return (u.square(), u, inside) if alpha == 1.5 else (u, inside, torch.zeros_like(u))
    inside = u > 0
    return _general(torch.log(torch.where(inside, u, 1)), inside, u, alpha)


def _general(log_u: Tensor, inside: Tensor, base: Tensor, alpha: Alpha) -> tuple[Tensor, Tensor, Tensor]:
    r = 1 / (alpha - 1)
    keep = torch.where(inside, 1.0, torch.where(torch.isnan(base), torch.nan, 0.0)).to(base.dtype)
    first = torch.exp(r * log_u) * keep
    return first, torch.exp((r - 1) * log_u) * keep, torch.exp((r - 2) * log_u) * keep


def sums(v: Tensor, place: Tensor, alpha: Alpha) -> tuple[Tensor, Tensor, Tensor]:
    """The accumulators (a0, a1, a2) of one update, [..., 1] each: the sums of `powers` over a block; blocks add up."""
    first, second, third = powers(v, place, alpha)
    return first.sum(-1, keepdim=True), second.sum(-1, keepdim=True), third.sum(-1, keepdim=True)


def update(state: Bracket, a0: Tensor, a1: Tensor, a2: Tensor, alpha: Alpha) -> Bracket:
    """One step from the accumulators at `state.place`.

    The r-norm of [z - tau]_+ is convex in tau, so its tangent reaches one at or below the root, wherever it is drawn: every
    step raises the lower bound, also a step that comes from above. For alpha = 1.5 the parabola of the present support
    bounds the other side and is the root itself once the support is right; for alpha = 2 the tangent is that. Else the next
    point is Halley's where it falls into the bracket, the tangent's where the root lies above, and the middle otherwise.
    """
    place, low, high = state.place, state.low, state.high
    r = 1 / (alpha - 1)
    excess = a0 - 1
    rising = excess >= 0
    slope = a1.clamp(min=torch.finfo(a1.dtype).tiny)
    # a0 - a0^(2 - alpha), which vanishes at the root
    tangent = place - a0 * torch.expm1((1 - alpha) * torch.log1p(excess.clamp(min=-1))) / slope
    low = torch.minimum(torch.maximum(low, tangent), high)
    high = torch.maximum(torch.where(rising, high, torch.minimum(high, place)), low)
    if isinstance(alpha, Tensor) or alpha not in (1.5, 2.0):
        curve = 2 * r * a1.square() - (r - 1) * excess * a2
        guess = torch.where(curve > 0, place + 2 * excess * a1 / curve, torch.inf)
    elif alpha == 2.0:
        guess = tangent
    else:
        inner = a1.square() - a2 * excess
        root = place + excess / (slope + torch.sqrt(inner.clamp(min=0)))
        guess = torch.where(inner >= 0, root, torch.inf)
        high = torch.where(rising, torch.maximum(torch.minimum(high, guess), low), high)
        low = torch.where(rising | (inner < 0), low, torch.minimum(torch.maximum(low, root), high))
    fallback = torch.where(rising, low, (low + high) / 2)
    return Bracket(torch.where((guess >= low) & (guess <= high), guess, fallback), low, high)
