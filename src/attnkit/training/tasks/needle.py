"""Needles in noise: `key value value ..` somewhere among tokens that mean nothing, and a question at the end."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from attnkit.training.data.packing import IGNORED
from attnkit.training.tasks.base import Examples, check_length
from attnkit.training.tasks.draw import distinct, places

__all__ = ["MultiKeyNeedle", "Needle"]

NEEDLE, QUESTION = 0, 1  # marks before a needle and before the key that is asked for
_MARKS = 2


@dataclass(frozen=True)
class Needle:
    """One needle `mark key values`, noise around it, and `question key values` at the end.

    Attributes:
        keys: number of keys.
        values: number of value tokens.
        digits: values of a needle.
        noise: number of noise tokens.
    """

    keys: int = 32
    values: int = 32
    digits: int = 4
    noise: int = 64
    needles: ClassVar[int] = 1
    name: ClassVar[str] = "needle"

    @property
    def vocab_size(self) -> int:
        """Marks, keys, values, noise."""
        return _MARKS + self.keys + self.values + self.noise

    @property
    def chance(self) -> float:
        """One in as many as there are values."""
        return 1 / self.values

    def generate(self, seed: int, n: int, length: int) -> Examples:
        """n examples [n, length]; the key that is asked for belongs to one of the needles, each as likely.

        Raises:
            OptionError: `length` has no room for the needles and the question.
        """
        width = 2 + self.digits
        check_length(self.name, length, (self.needles + 1) * width)
        random = np.random.default_rng(seed)
        first_value = _MARKS + self.keys
        ids = random.integers(first_value + self.values, self.vocab_size, (n, length))
        keys = _MARKS + distinct(random, n, self.needles, self.keys)
        answers = first_value + random.integers(0, self.values, (n, self.needles, self.digits))
        starts = places(random, n, length - width, self.needles, width)
        rows = np.arange(n)
        for which in range(self.needles):
            block = np.concatenate([np.full((n, 1), NEEDLE), keys[:, which, None], answers[:, which]], 1)
            ids[rows[:, None], starts[:, which, None] + np.arange(width)] = block
        asked = random.integers(0, self.needles, n)
        ids[:, -width], ids[:, -width + 1] = QUESTION, keys[rows, asked]
        ids[:, -self.digits :] = answers[rows, asked]
        labels = np.full_like(ids, IGNORED)
        labels[:, -self.digits :] = ids[:, -self.digits :]
        return Examples(ids, labels)


@dataclass(frozen=True)
class MultiKeyNeedle(Needle):
    """Eight needles with different keys, one of which is asked for."""

    needles: ClassVar[int] = 8
    name: ClassVar[str] = "needle-multikey"
