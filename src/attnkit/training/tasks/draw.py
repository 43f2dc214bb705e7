"""Random choices that tasks share, one row an example."""

import numpy as np

__all__ = ["distinct", "places", "shuffled"]


def distinct(random: np.random.Generator, n: int, count: int, size: int) -> np.ndarray:
    """[n, count] numbers below `size`, different from each other within a row."""
    order: np.ndarray = np.argsort(random.random((n, size)), 1)
    return order[:, :count]


def shuffled(random: np.random.Generator, n: int, count: int) -> np.ndarray:
    """[n, count], a permutation in each row."""
    return distinct(random, n, count, count)


def places(random: np.random.Generator, n: int, room: int, blocks: int, width: int) -> np.ndarray:
    """[n, blocks] rising starts of blocks of `width` tokens that do not overlap in `room` tokens."""
    free = room - blocks * (width - 1)
    starts: np.ndarray = np.sort(distinct(random, n, blocks, free), 1) + np.arange(blocks) * (width - 1)
    return starts
