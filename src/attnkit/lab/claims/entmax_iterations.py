"""System 4: how many updates the threshold of alpha-entmax takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attnkit.lab.claims.claim import Cell, Claim, Conclusion, Row, Verdict
from attnkit.lab.claims.figures import lines, table
from attnkit.lab.claims.place import Place
from attnkit.ops.entmax.solver import Bracket, begin, count_bins, sums, update

__all__ = ["CLAIM", "METHODS", "exact_threshold"]

_MOST = 64  # updates
_PROMISED = 2  # updates after a histogram
_JUDGED = 1.5  # alpha
_FEWER = 3  # times fewer updates than bisection


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        alphas: 1.5 and 2.
        lengths: entries of a row.
        spreads: standard deviations of Gaussian scores.
        rows: of each kind and seed.
        tolerance: how far the threshold of z = (alpha - 1) * scores may be away.
        seeds: of the scores.
    """

    alphas: tuple[float, ...] = (1.5, 2.0)
    lengths: tuple[int, ...] = (64, 512, 4096, 8192, 65536)
    spreads: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0, 4.0, 16.0)
    rows: int = 64
    tolerance: float = 1e-6
    seeds: tuple[int, ...] = (0,)


def exact_threshold(z: Tensor, alpha: float) -> Tensor:
    """tau [R, 1] of rows [R, n] by sorting: the support is a prefix, and the threshold of each prefix has a closed form.

    Args:
        z: (alpha - 1) * scores in float64.
        alpha: 1.5 or 2.
    Source: Peters et al. 2019 (arXiv:1905.05702), algorithm 2; Martins and Astudillo 2016 (arXiv:1602.02068).
    """
    ordered = z.sort(-1, descending=True).values
    top = ordered[:, :1]
    v = ordered - top
    n = torch.arange(1, z.shape[1] + 1, dtype=z.dtype)
    mean = v.cumsum(-1) / n
    if alpha == 2.0:
        tau = mean - 1 / n
    else:
        scatter = v.square().cumsum(-1) - n * mean.square()
        tau = mean - ((1 - scatter) / n).clamp(min=0).sqrt()
    size = (v > tau).sum(-1, keepdim=True)
    return top + tau.gather(-1, size - 1)


def _bisection(z: Tensor, alpha: float) -> Iterator[Tensor]:
    low, high = _ends(z, alpha)
    while True:
        yield (low + high) / 2
        middle = (low + high) / 2
        above = _excess(z, middle, alpha)[0] > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)


def _halley(z: Tensor, alpha: float, bins: int = 0) -> Iterator[Tensor]:
    """Halley's step, or the middle of the bracket where it falls outside; from the middle of the row's or a histogram's."""
    low, high = _ends(z, alpha)
    top = z.amax(-1, keepdim=True)
    tau = (low + high) / 2
    if bins:
        found = begin(torch.full_like(top, z.shape[1]), alpha, count_bins(z - top, bins))
        low, high, tau = top + found.low, top + found.high, top + found.place
    while True:
        yield tau
        excess, slope, curve = _excess(z, tau, alpha)
        low, high = torch.where(excess > 0, tau, low), torch.where(excess > 0, high, tau)
        step = tau - 2 * excess * slope / (2 * slope.square() - excess * curve)
        tau = torch.where((step >= low - 1e-12) & (step <= high + 1e-12), step, (low + high) / 2)


def _ours(z: Tensor, alpha: float) -> Iterator[Tensor]:
    top = z.amax(-1, keepdim=True)
    state: Bracket = begin(torch.full_like(top, z.shape[1]), alpha, count_bins(z - top))
    while True:
        yield top + state.place
        state = update(state, *sums(z - top, state.place, alpha), alpha)


def _ends(z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    top = z.amax(-1, keepdim=True)
    return top - 1, top - z.shape[1] ** (1 - alpha)


def _excess(z: Tensor, tau: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """sum [z - tau]_+^r - 1 and its first two derivatives by tau."""
    r = 1 / (alpha - 1)
    u = (z - tau).clamp(min=0)
    a1 = u.sum(-1, keepdim=True) if alpha == 1.5 else (u > 0).to(z.dtype).sum(-1, keepdim=True)
    a2 = (u > 0).to(z.dtype).sum(-1, keepdim=True) if alpha == 1.5 else torch.zeros_like(tau)
    return u.pow(r).sum(-1, keepdim=True) - 1, -r * a1, r * (r - 1) * a2


# name -> estimates after 0, 1, 2, ... updates; each update walks over the row once
METHODS: dict[str, Callable[[Tensor, float], Iterator[Tensor]]] = {
    "bisection": _bisection,
    "Halley": _halley,
    "Halley from a histogram": partial(_halley, bins=8),
    "attnkit": _ours,
}


def updates_needed(z: Tensor, alpha: float, method: str, tolerance: float) -> Tensor:
    """Updates [R] after which the estimate is within the tolerance; _MOST where it never is."""
    exact = exact_threshold(z, alpha)
    needed = torch.full((z.shape[0],), _MOST)
    for count, tau in zip(range(_MOST), METHODS[method](z, alpha), strict=False):
        reached = ((tau - exact).abs() <= tolerance)[:, 0]
        needed = torch.where(reached & (needed == _MOST), count, needed)
        if bool((needed < _MOST).all()):
            break
    return needed


def _cells(settings: Settings) -> list[Cell]:
    return [
        Cell(f"alpha {alpha:g}, {length:,} entries", length, partial(_measure, settings, alpha, length))
        for alpha in settings.alphas
        for length in settings.lengths
    ]


def _measure(settings: Settings, alpha: float, length: int, place: Place) -> list[Row]:
    rows = []
    for spread in settings.spreads:
        drawn = []
        for seed in settings.seeds:
            generator = torch.Generator().manual_seed(seed)
            drawn.append(torch.randn(settings.rows, length, generator=generator, dtype=torch.float64))
        z = torch.cat(drawn) * spread * (alpha - 1)
        for method in METHODS:
            needed = updates_needed(z, alpha, method, settings.tolerance)
            found = {"mean": needed.double().mean().item(), "worst": int(needed.max())}
            rows.append({"alpha": alpha, "length": length, "spread": spread, "method": method, **found})
    return rows


def _conclude(settings: Settings, rows: Sequence[Row]) -> Conclusion:
    worst = {(row["alpha"], row["length"], row["spread"], row["method"]): row["worst"] for row in rows}
    figures = []
    for alpha in settings.alphas:
        over: dict[str, list[tuple[float, list[float]]]] = {method: [] for method in METHODS}
        for method, points in over.items():
            for length in settings.lengths:
                found = [worst.get((alpha, length, spread, method)) for spread in settings.spreads]
                points.append((length, [count for count in found if count is not None]))
        title, note = (
            f"Updates to {settings.tolerance:g}, alpha {alpha:g}",
            "The slowest row: mean and range over the spreads of scores.",
        )
        figures.append(lines(title, "entries of a row", "updates", over, log_x=True, note=note))
    tables = []
    for alpha in settings.alphas:
        cells = [
            [f"{length:,}", f"{spread:g}", *(worst.get((alpha, length, spread, method)) for method in METHODS)]
            for length in settings.lengths
            for spread in settings.spreads
        ]
        title = f"Updates of the slowest of {settings.rows * len(settings.seeds)} rows, alpha {alpha:g}"
        tables.append(table(title, ["entries", "spread", *METHODS], cells, "Histograms cost one more walk over the row."))
    return Conclusion(_judge(settings, rows), figures, tables)


def _judge(settings: Settings, rows: Sequence[Row]) -> Verdict:
    """By alpha 1.5, which the paper's histogram is for; the other alphas are in the tables."""
    numbers: dict[str, float | None] = {}
    for method in METHODS:
        chosen = [row for row in rows if row["method"] == method and row["alpha"] == _JUDGED]
        numbers[f"{method}, spreads from 1"] = max((row["worst"] for row in chosen if row["spread"] >= 1), default=None)
        numbers[f"{method}, all spreads"] = max((row["worst"] for row in chosen), default=None)
    found = [value for value in numbers.values() if value is not None]
    if len(found) < len(numbers):
        return Verdict("undecided", "No row has alpha 1.5 and a spread of 1 or more.", numbers)
    bisection, _, halley, _, wide, every, own, own_every = found
    reason = (
        f"Alpha 1.5, the slowest row: where scores spread by 1 or more, {bisection:g} updates of bisection, {halley:g} of "
        f"Halley's from the middle of the bracket, {wide:g} from a histogram (attnkit's solver {own:g}); among all spreads the "
        f"histogram leaves {every:g} (attnkit's solver {own_every:g})."
    )
    fewer, enough = halley * _FEWER <= bisection, wide <= _PROMISED
    if fewer and enough:
        return Verdict("holds" if every <= _PROMISED else "holds in part", reason, numbers)
    return Verdict("holds in part" if fewer or enough else "does not hold", reason, numbers)


CLAIM = Claim(
    name="entmax-iterations",
    systems=(4,),
    says=(
        "Halley's steps inside a bracket need a few updates where bisection needs twenty, and after a histogram one or two are "
        "left"
    ),
    source="Goncalves et al. 2025 (arXiv:2502.12082), section 3; arXiv:2604.15180",
    protocol=(
        "Gaussian rows in float64, thresholds against those found by sorting; updates until the slowest row is within 1e-6. "
        "For alpha 1.5 it holds if Halley's steps from the middle of the bracket need a third of bisection's, and two are "
        "enough after the histogram; in part if only one of both is so, or only where scores spread by 1 or more."
    ),
    minutes=1,
    device="cpu",
    settings=Settings,
    quick={"lengths": (64, 256), "spreads": (0.5, 1.0), "rows": 8},
    cells=_cells,
    conclude=_conclude,
)
