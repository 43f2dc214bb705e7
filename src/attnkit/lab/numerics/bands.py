"""What a distance between weights is large or small against: bands, ratios with intervals, a verdict."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from attnkit._core.errors import InputError, OptionError
from attnkit.lab.numerics.weights import Metric, WeightDeviation

__all__ = ["PAPER_RANGE", "JUDGED", "Ratio", "ReferenceBands", "Verdict", "contextualize", "significance"]

JUDGED: tuple[Metric, ...] = ("max_abs", "w1")
PAPER_RANGE = (0.2, 0.5)  # Golden et al.: two to five times smaller than the deviation that low precision causes
_SAMPLES, _SEED = 2000, 0


@dataclass(frozen=True)
class Ratio:
    """One deviation in terms of another.

    Attributes:
        value: their quotient.
        low, high: its 95 % interval, from a bootstrap over tensors. The tensors of a run are no independent runs: the
            interval says how much the result hangs on single tensors, and seeds may differ by more.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ReferenceBands:
    """Deviations that are known, at the step of the one that is judged, against the same weights.

    Attributes:
        random_init: from a run that began with other random weights.
        precision: from a run in another number format.
        repeat: from the same run done again: 0 where nothing is random; None where it was not done.
    """

    random_init: WeightDeviation
    precision: WeightDeviation
    repeat: WeightDeviation | None = None


@dataclass(frozen=True)
class Verdict:
    """What `contextualize` says.

    Attributes:
        outcome: "accept", "inconclusive" or "reject".
        ratios: metric -> the deviation in terms of the smaller band; empty where the bands are not valid.
        margin: what the ratios were compared with.
        reason: one sentence.
    """

    outcome: Literal["accept", "inconclusive", "reject"]
    ratios: Mapping[str, Ratio]
    margin: float
    reason: str


def significance(deviation: WeightDeviation, precision: WeightDeviation) -> dict[str, Ratio]:
    """How large a deviation is in terms of the one that a change of the number format causes.

    Args:
        deviation: the one in question.
        precision: of two runs in different formats, otherwise alike.
    Returns:
        "max_abs" and "w1" -> ratio. Golden et al. report that FlashAttention's is 1/5 to 1/2 (PAPER_RANGE).
    Raises:
        InputError: they are of different models, or the second is 0.
    Source: Golden et al. 2024 (arXiv:2405.02803).
    """
    zero = [metric for metric in JUDGED if not precision.total(metric)]
    if zero:
        raise InputError(f"precision is 0 in {' and '.join(zero)}: the two runs are the same; give runs in two formats")
    return {metric: _ratio(deviation, [precision], metric) for metric in JUDGED}


def contextualize(deviation: WeightDeviation, bands: ReferenceBands, *, margin: float) -> Verdict:
    """Judge a deviation by bands: is it small against what other choices, which nobody worries about, change?

    It is accepted where both D_max and W1 are below `margin` times the smaller band, rejected where one is above, with their
    whole 95 % intervals. What lies on the line is inconclusive, and so is everything where the bands are not valid: not
    finite, zero, or not above what a repetition of the run changes.

    This bounds how similar two trainings are. It is no proof that either is stable.

    Args:
        deviation: of the run in question from the reference run.
        bands: of other runs from the same reference run.
        margin: how many bands are too many. There is no default: what is tolerable is yours to say.
    Raises:
        OptionError: `margin` is not positive and finite.
        InputError: the deviations are of different models.
    """
    if not 0 < margin < math.inf:
        raise OptionError(f"margin={margin} must be positive and finite; 1 asks for less than the smaller band")
    for metric in JUDGED:
        fault = _fault(bands, metric)
        if fault:
            return Verdict("inconclusive", {}, margin, fault)
    ratios: dict[str, Ratio] = {metric: _ratio(deviation, [bands.random_init, bands.precision], metric) for metric in JUDGED}
    above = [metric for metric, ratio in ratios.items() if ratio.low > margin]
    open_ = [metric for metric, ratio in ratios.items() if ratio.low <= margin <= ratio.high]
    if above:
        return Verdict("reject", ratios, margin, f"{' and '.join(above)} above {margin:g} times the smaller band")
    if open_:
        return Verdict(
            "inconclusive", ratios, margin, f"{' and '.join(open_)} on the line of {margin:g} times the smaller band"
        )
    return Verdict("accept", ratios, margin, f"{' and '.join(JUDGED)} below {margin:g} times the smaller band")


def _fault(bands: ReferenceBands, metric: Metric) -> str:
    """Why the bands are of no use, or nothing."""
    totals = {name: getattr(bands, name).total(metric) for name in ("random_init", "precision")}
    for name, total in totals.items():
        if not 0 < total < math.inf:
            return f"the band {name} is {total:g} in {metric}"
    floor = 0.0 if bands.repeat is None else bands.repeat.total(metric)
    assert floor is not None
    smaller = min(totals, key=lambda name: totals[name])
    if floor >= totals[smaller]:
        return f"repeating the run changes {metric} by {floor:g}, the band {smaller} by {totals[smaller]:g}"
    return ""


def _ratio(part: WeightDeviation, wholes: Sequence[WeightDeviation], metric: Metric) -> Ratio:
    """A deviation in terms of the smallest of others; for each bootstrap sample the same tensors are drawn in all."""
    names = [tensor.name for tensor in part.tensors]
    for whole in wholes:
        if [tensor.name for tensor in whole.tensors] != names:
            raise InputError("the deviations are of different tensors; compare runs of one architecture")
    sizes = np.array([tensor.numel for tensor in part.tensors], np.float64)
    places = np.random.default_rng(_SEED).integers(0, len(names), size=(_SAMPLES, len(names)))
    totals = [_aggregator(deviation, metric, sizes) for deviation in (part, *wholes)]

    def quotient(drawn: np.ndarray) -> np.ndarray:
        top, *bottoms = (total(drawn) for total in totals)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(top / np.min(bottoms, axis=0))

    with np.errstate(invalid="ignore"):  # between two infinities there is nothing to interpolate
        low, high = np.nanpercentile(quotient(places), [2.5, 97.5])
    return Ratio(float(quotient(np.arange(len(names)))), float(np.nan_to_num(low)), math.inf if np.isnan(high) else float(high))


def _aggregator(deviation: WeightDeviation, metric: Metric, sizes: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    values = np.array([getattr(tensor, metric) for tensor in deviation.tensors])

    def total(drawn: np.ndarray) -> np.ndarray:
        if metric == "max_abs":
            return np.asarray(values[drawn].max(-1))
        return np.asarray((values[drawn] * sizes[drawn]).sum(-1) / sizes[drawn].sum(-1))

    return total
