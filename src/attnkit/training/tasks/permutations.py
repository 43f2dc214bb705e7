"""Words over the symmetric group: after every letter, which permutation is the product so far? (State tracking.)"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from attnkit.training.data.packing import IGNORED
from attnkit.training.tasks.base import Examples, check_length

__all__ = ["PermutationWords", "group_table"]


@lru_cache(maxsize=4)
def group_table(points: int) -> np.ndarray:
    """[points!, points!]: entry (a, b) is the number of "first b, then a", permutations in lexicographic order."""
    elements = list(itertools.permutations(range(points)))
    number = {element: index for index, element in enumerate(elements)}
    return np.array([[number[tuple(a[image] for image in b)] for b in elements] for a in elements])


@dataclass(frozen=True)
class PermutationWords:
    """Random elements of S_n, then a mark; the label after each is the product of all so far, which is never shown.

    Attributes:
        points: n; S_5 is the smallest symmetric group that is not solvable.
    """

    points: int = 5
    name: ClassVar[str] = "permutations"

    @property
    def vocab_size(self) -> int:
        """The elements, then the mark."""
        return math.factorial(self.points) + 1

    @property
    def chance(self) -> float:
        """One in as many as there are elements."""
        return 1 / math.factorial(self.points)

    def generate(self, seed: int, n: int, length: int) -> Examples:
        """n examples [n, length], words of length - 1 letters.

        Raises:
            OptionError: fewer than two tokens.
        """
        check_length(self.name, length, 2)
        table = group_table(self.points)
        word = np.random.default_rng(seed).integers(0, len(table), (n, length - 1))
        labels = np.full((n, length), IGNORED, np.int64)
        labels[:, 1] = word[:, 0]
        for place in range(1, length - 1):
            labels[:, place + 1] = table[word[:, place], labels[:, place]]
        return Examples(np.concatenate([word, np.full((n, 1), len(table))], 1), labels)
