"""Copying: random tokens, a mark, the same tokens again."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from attnkit.training.data.packing import IGNORED
from attnkit.training.tasks.base import Examples, check_length

__all__ = ["Copying"]

MARK = 0


@dataclass(frozen=True)
class Copying:
    """A string, a mark, the string again; an even length begins with one more mark.

    Attributes:
        alphabet: number of tokens in strings.
    """

    alphabet: int = 64
    name: ClassVar[str] = "copy"

    @property
    def vocab_size(self) -> int:
        """The mark, then the alphabet."""
        return 1 + self.alphabet

    @property
    def chance(self) -> float:
        """One in as many as there are letters."""
        return 1 / self.alphabet

    def generate(self, seed: int, n: int, length: int) -> Examples:
        """n examples [n, length].

        Raises:
            OptionError: fewer than three tokens.
        """
        check_length(self.name, length, 3)
        half = (length - 1) // 2
        string = np.random.default_rng(seed).integers(1, self.vocab_size, (n, half))
        ids = np.full((n, length), MARK, np.int64)
        ids[:, -half:], ids[:, -2 * half - 1 : -half - 1] = string, string
        labels = np.full_like(ids, IGNORED)
        labels[:, -half:] = string
        return Examples(ids, labels)
