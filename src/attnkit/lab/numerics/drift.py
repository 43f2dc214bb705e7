"""Does an error point one way? Its cumulative sum, and a test over the last samples."""

import math
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["ALARM_Z", "MIN_SAMPLES", "WINDOW", "Drift", "normal_score", "score"]

WINDOW = 50
MIN_SAMPLES = 20
ALARM_Z = 6.0


class Drift:
    """Samples of one signed error for each of some heads.

    Args:
        window: samples that the test looks back on.

    Attributes:
        samples: how many came.
        total: [H], their sum.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self.samples = 0
        self.total: Tensor | None = None
        self._last: deque[Tensor] = deque(maxlen=window)
        self._z: Tensor | None = None

    def add(self, errors: Tensor) -> None:
        """One sample, [H] in float64."""
        self.samples += 1
        self.total = errors if self.total is None else self.total + errors
        self._last.append(errors)
        self._z = None

    @property
    def window(self) -> int:
        """Samples that `z` is made of."""
        return len(self._last)

    def forget(self) -> None:
        """Empty the window: what is measured from now on has another cause."""
        self._last.clear()
        self._z = None

    def z(self) -> Tensor:
        """[H]: `normal_score` of the samples in the window; 0 where it is empty."""
        if not self._last:
            return torch.zeros_like(self.total) if self.total is not None else torch.zeros(0, dtype=torch.float64)
        if self._z is None:
            score([self])
        assert self._z is not None
        return self._z


def score(drifts: Iterable[Drift]) -> None:
    """Work out the z of many at once, those with windows of one size together."""
    alike: dict[tuple[int, torch.Size], list[Drift]] = {}
    for drift in drifts:
        if drift._last:
            alike.setdefault((drift.window, drift._last[0].shape), []).append(drift)
    for (window, _), same in alike.items():
        samples = torch.stack([errors for drift in same for errors in drift._last]).unflatten(0, (len(same), window))
        for drift, z in zip(same, normal_score(samples.transpose(0, 1)), strict=True):
            drift._z = z


def normal_score(samples: Tensor) -> Tensor:
    """How many standard deviations of a normal distribution a mean is away from 0, however few samples there are.

    Student's t of the samples, turned into the normal deviate of the same tail by Wallace's approximation: four samples that
    happen to agree have a large t and a small z.

    Args:
        samples: [n, ...].
    Returns:
        [...], with the sign of the mean; 0 where there is one sample or all are 0.
    Source: Wallace 1959, "Bounds on normal approximations to Student's and the chi-square distributions".
    """
    free = len(samples) - 1
    if free < 1:
        return torch.zeros_like(samples[0])
    spread, mean = torch.std_mean(samples, 0)
    t = torch.where(mean == 0, 0.0, mean / (spread / math.sqrt(free + 1))).clamp(-1e15, 1e15)
    return t.sign() * (8 * free + 1) / (8 * free + 3) * torch.sqrt(free * torch.log1p(t.square() / free))
