"""How far two sets of weights are apart: the largest difference, and the distance between distributions of values."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnkit._core.errors import DTypeError, InputError, OptionError, ShapeError

__all__ = ["METRICS", "Metric", "TensorDeviation", "WeightDeviation", "wasserstein1d", "weight_deviation"]

Metric = Literal["max_abs", "w1", "max_abs_std", "w1_std", "max_abs_update", "w1_update"]
METRICS: tuple[Metric, ...] = ("max_abs", "w1", "max_abs_std", "w1_std", "max_abs_update", "w1_update")


@dataclass(frozen=True)
class TensorDeviation:
    """How far two tensors of one name are apart. What has no unit to be measured in is infinite, no deviation is 0.

    Attributes:
        name: of the tensor.
        numel: its elements.
        max_abs: the largest difference of two elements at one place, D_max.
        w1: Wasserstein-1 distance of the two distributions of values. It does not see which element has which value: it is 0
            between a tensor and its permutation.
        max_abs_std, w1_std: the same in standard deviations of the first tensor.
        max_abs_update, w1_update: the same in terms of how far training has moved the first tensor, root mean square over
            its elements; None where the start is not known.
    """

    name: str
    numel: int
    max_abs: float
    w1: float
    max_abs_std: float
    w1_std: float
    max_abs_update: float | None
    w1_update: float | None


@dataclass(frozen=True)
class WeightDeviation:
    """How far two sets of weights are apart.

    Attributes:
        tensors: one entry a tensor, in the order of the first set.
    """

    tensors: tuple[TensorDeviation, ...]

    def total(self, metric: Metric) -> float | None:
        """A metric of all tensors: the largest of largest differences, the mean over all elements of distances."""
        values = [getattr(tensor, metric) for tensor in self.tensors]
        if None in values:
            return None
        if metric.startswith("max_abs"):
            return float(max(values))
        sizes = [tensor.numel for tensor in self.tensors]
        return float(sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes))


def wasserstein1d(a: Tensor, b: Tensor, p: float = 1) -> float:
    """Wasserstein-p distance of two samples on a line, each value with equal weight.

    It is the p-norm of the difference of the quantile functions, which are staircases: exact up to rounding in float64,
    for samples of different sizes too.

    Args:
        a, b: any shape, any real dtype; only the values count.
        p: at least 1, finite.
    Raises:
        OptionError: p outside its range.
        InputError: a sample is empty, or holds NaN or infinities.
    Source: Golden et al. 2024 (arXiv:2405.02803) use p = 1 on weights; sorting solves transport on a line.
    Complexity: O(n log n) time, memory of a few copies.

    >>> import torch
    >>> wasserstein1d(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([8.0, 5.0, 6.0]))
    5.0
    """
    if not 1 <= p < float("inf"):
        raise OptionError(f"p={p} is not allowed; choose a finite number of 1 or more")
    first, second = (_finite(name, t).flatten().sort().values for name, t in (("a", a), ("b", b)))
    n, m = len(first), len(second)
    if n == m:
        powers = (first - second).abs() ** p
        return float(powers.mean() ** (1 / p))
    steps = [torch.arange(1, count + 1, device=first.device) * other for count, other in ((n, m), (m, n))]
    ends = torch.cat(steps).sort().values  # of the pieces on which both staircases are flat, in units of 1 / (n m)
    widths = torch.diff(ends, prepend=ends.new_zeros(1))
    here, there = (torch.searchsorted(step, ends) for step in steps)
    powers = (first[here] - second[there]).abs() ** p
    return float(((widths * powers).sum() / (n * m)) ** (1 / p))


def weight_deviation(
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    start: Mapping[str, Tensor] | None = None,
    *,
    device: str | torch.device = "cpu",
) -> WeightDeviation:
    """Compare two sets of weights, tensor by tensor.

    Tensors are asked for one after the other, so a mapping that reads them from a file needs memory for a few only.

    Args:
        state_a, state_b: name -> tensor, with the same names and shapes.
        start: the weights that `state_a` was trained from; None where they are not known.
        device: where to compute.
    Raises:
        InputError: names differ, nothing to compare, or a tensor is empty or holds NaN or infinities.
        ShapeError: shapes differ.
        DTypeError: complex numbers.
    """
    if not state_a:
        raise InputError("state_a has no tensors; give the state_dict of a model, or a folder with its weights")
    for title, other in (("state_b", state_b), ("start", start)):
        if other is not None and other.keys() != state_a.keys():
            raise InputError(
                f"{title} is of another model than state_a: {_some(state_a.keys() - other.keys())} only in state_a, "
                f"{_some(other.keys() - state_a.keys())} only in {title}; compare runs of one architecture"
            )
    found = []
    for name in state_a:
        states = (("state_a", state_a), ("state_b", state_b), ("start", start))
        tensors = [_finite(f"{title}[{name!r}]", s[name].to(device)) for title, s in states if s is not None]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if len(set(shapes)) > 1:
            raise ShapeError(f"{name} has shapes {', '.join(map(str, shapes))}; compare runs of one architecture")
        found.append(_compare(name, *tensors))
    return WeightDeviation(tuple(found))


def _compare(name: str, a: Tensor, b: Tensor, start: Tensor | None = None) -> TensorDeviation:
    largest, distance = float((a - b).abs().max()), wasserstein1d(a, b)
    std = float(a.std(correction=0))
    update = None if start is None else float((a - start).square().mean().sqrt())
    return TensorDeviation(
        name, a.numel(), largest, distance,
        max_abs_std=_ratio(largest, std),
        w1_std=_ratio(distance, std),
        max_abs_update=None if update is None else _ratio(largest, update),
        w1_update=None if update is None else _ratio(distance, update),
    )  # fmt: skip


def _ratio(value: float, unit: float) -> float:
    if unit:
        return value / unit
    return float("inf") if value else 0.0


def _finite(title: str, t: Tensor) -> Tensor:
    """The tensor in float64, detached."""
    if t.is_complex():
        raise DTypeError(f"{title} holds complex numbers, which have no order; compare real and imaginary parts")
    if not t.numel():
        raise InputError(f"{title} is empty; there is nothing to compare")
    wide = t.detach().double()
    if not torch.isfinite(wide).all():
        raise InputError(f"{title} holds NaN or infinities; a run that has diverged has no distance from another")
    return wide


def _some(names: Collection[str]) -> str:
    """A few of many names."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") if listed else "nothing"
