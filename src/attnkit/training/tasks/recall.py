"""Multi-query associative recall (MQAR, arXiv 2312.04927): pairs first, then every key again, each followed by its value."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from attnkit._core.errors import OptionError
from attnkit.training.data.packing import IGNORED
from attnkit.training.tasks.base import Examples, check_length
from attnkit.training.tasks.draw import distinct, shuffled

__all__ = ["AssociativeRecall"]


@dataclass(frozen=True)
class AssociativeRecall:
    """Half of the tokens are pairs `key value`, the other half asks for every key once, in another order.

    A quarter of `length` is the number of pairs. Keys are different from each other, values are drawn freely.

    Attributes:
        alphabet: number of keys, and of values; at least a quarter of the length.
    """

    alphabet: int = 64
    name: ClassVar[str] = "mqar"

    @property
    def vocab_size(self) -> int:
        """Keys, then values."""
        return 2 * self.alphabet

    @property
    def chance(self) -> float:
        """One in as many as there are values."""
        return 1 / self.alphabet

    def generate(self, seed: int, n: int, length: int) -> Examples:
        """n examples [n, length].

        Raises:
            OptionError: `length` is no multiple of 4, or it has more pairs than there are keys.
        """
        check_length(self.name, length, 8, multiple=4)
        pairs = length // 4
        if pairs > self.alphabet:
            raise OptionError(f"length={length} has {pairs} pairs, and alphabet={self.alphabet} so many keys; raise alphabet")
        random = np.random.default_rng(seed)
        keys = distinct(random, n, pairs, self.alphabet)
        values = self.alphabet + random.integers(0, self.alphabet, (n, pairs))
        order = shuffled(random, n, pairs)
        ids = np.empty((n, length), np.int64)
        ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
        ids[:, 2 * pairs :: 2] = np.take_along_axis(keys, order, 1)
        ids[:, 2 * pairs + 1 :: 2] = np.take_along_axis(values, order, 1)
        labels = np.full_like(ids, IGNORED)
        labels[:, 2 * pairs + 1 :: 2] = ids[:, 2 * pairs + 1 :: 2]
        return Examples(ids, labels)
