"""Variable tracking: chains of assignments among noise, and the question what the last variable of one holds."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from attnkit.training.data.packing import IGNORED
from attnkit.training.tasks.base import Examples, check_length
from attnkit.training.tasks.draw import distinct, places, shuffled

__all__ = ["VariableTracking"]

SET, QUESTION = 0, 1
_MARKS, _WIDTH = 2, 3


@dataclass(frozen=True)
class VariableTracking:
    """Statements `set variable source`; a source is a value or a variable that was set before.

    Attributes:
        chains: chains, each with a value of its own.
        hops: assignments from variable to variable in a chain.
        variables: number of names; every statement sets another one.
        values: number of values; chains have different ones.
        noise: number of noise tokens between statements.
    """

    chains: int = 2
    hops: int = 3
    variables: int = 32
    values: int = 16
    noise: int = 16
    name: ClassVar[str] = "variables"

    @property
    def vocab_size(self) -> int:
        """Marks, variables, values, noise."""
        return _MARKS + self.variables + self.values + self.noise

    @property
    def chance(self) -> float:
        """One in as many as there are values."""
        return 1 / self.values

    def generate(self, seed: int, n: int, length: int) -> Examples:
        """n examples [n, length]; the question is about the end of one of the chains.

        Raises:
            OptionError: `length` has no room for the statements and the question.
        """
        links = self.hops + 1
        statements = self.chains * links
        check_length(self.name, length, (statements + 1) * _WIDTH)
        random = np.random.default_rng(seed)
        first_value = _MARKS + self.variables
        ids = random.integers(first_value + self.values, self.vocab_size, (n, length))
        names = _MARKS + distinct(random, n, statements, self.variables)  # chain after chain
        values = first_value + distinct(random, n, self.chains, self.values)
        sources = np.roll(names, 1, axis=1)
        sources[:, ::links] = values
        starts = places(random, n, length - _WIDTH, statements, _WIDTH)
        # which chain each statement in the text belongs to; within a chain the order stays
        owner = shuffled(random, n, statements) // links
        order = np.argsort(np.argsort(owner, axis=1, kind="stable"), axis=1)
        rows = np.arange(n)[:, None]
        for offset, part in enumerate((np.full_like(names, SET), names, sources)):
            ids[rows, starts + offset] = np.take_along_axis(part, order, 1)
        asked = random.integers(0, self.chains, n)
        ids[:, -3], ids[:, -2] = QUESTION, names[np.arange(n), asked * links + self.hops]
        ids[:, -1] = values[np.arange(n), asked]
        labels = np.full_like(ids, IGNORED)
        labels[:, -1] = ids[:, -1]
        return Examples(ids, labels)
