"""Does an error point one way? Its cumulative sum, and a test over the last samples."""

import math
from collections import deque

import torch
from torch import Tensor

__all__ = ["ALARM_Z", "MIN_SAMPLES", "WINDOW", "Drift", "normal_score"]

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

    def add(self, errors: Tensor) -> None:
        """One sample, [H] in float64."""
        self.samples += 1
        self.total = errors if self.total is None else self.total + errors
        self._last.append(errors)

    @property
    def window(self) -> int:
        """Samples that `z` is made of."""
        return len(self._last)

    def forget(self) -> None:
        """Empty the window: what is measured from now on has another cause."""
        self._last.clear()

    def z(self) -> Tensor:
        """[H]: `normal_score` of the samples in the window; 0 where it is empty."""
        if not self._last:
            return torch.zeros_like(self.total) if self.total is not None else torch.zeros(0, dtype=torch.float64)
        return normal_score(torch.stack(list(self._last)))


def normal_score(samples: Tensor) -> Tensor:
    """How many standard deviations of a normal distribution a mean is away from 0, however few samples there are.

    Student's t of the samples, turned into the normal deviate of the same tail by Wallace's approximation: four samples that
    happen to agree have a large t and a small z.

    Args:
        samples: [n, H].
    Returns:
        [H], with the sign of the mean; 0 where there is one sample or all are 0.
    Source: Wallace 1959, "Bounds on normal approximations to Student's and the chi-square distributions".
    """
    free = len(samples) - 1
    if free < 1:
        return torch.zeros_like(samples[0])
    mean, spread = samples.mean(0), samples.std(0)
    t = torch.where(spread > 0, mean / (spread / math.sqrt(free + 1)), torch.where(mean == 0, 0.0, mean.sign() * math.inf))
    t = t.clamp(-1e15, 1e15)
    return t.sign() * (8 * free + 1) / (8 * free + 3) * torch.sqrt(free * torch.log1p(t.square() / free))
