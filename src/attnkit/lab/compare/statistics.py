"""Intervals: of a share of hits, and of a mean of numbers that depend on their neighbours."""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["block_bootstrap", "wilson"]

Z95 = 1.959963984540054
BLOCK = 16
SAMPLES = 2000


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of hits / trials, trials >= 1.

    (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)
    """
    share, weight = hits / trials, Z95**2 / trials
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    # at 0 and 1 the bounds are exact in theory and off by a rounding here
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == trials else middle + half)


def block_bootstrap(series: Sequence[Sequence[float]], *, seed: int) -> tuple[float, float, float]:
    """The mean of all values and its 95 % interval: the percentiles of means over resampled moving blocks.

    Neighbouring token losses are correlated, so blocks of up to 16 neighbours are drawn, within each series.

    Args:
        series: one list of values per text window, none of them empty.
        seed: of the draws; equal seeds draw the same places, so intervals of methods can be compared.
    Returns:
        mean, lower and upper bound.
    """
    generator = np.random.default_rng(seed)
    totals, count = np.zeros(SAMPLES), 0
    for values in map(np.asarray, series):
        size = min(BLOCK, max(len(values) // 4, 1))
        blocks = math.ceil(len(values) / size)
        starts = generator.integers(0, len(values) - size + 1, size=(SAMPLES, blocks, 1))
        places = (starts + np.arange(size)).reshape(SAMPLES, -1)[:, : len(values)]
        totals += values[places].sum(axis=1)
        count += len(values)
    low, high = np.percentile(totals / count, [2.5, 97.5])
    return float(sum(map(math.fsum, series)) / count), float(low), float(high)
