"""What a model must beat: an n-gram over tokens with interpolated Kneser-Ney smoothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnkit._core.errors import InputError, OptionError

__all__ = ["KneserNey"]


@dataclass(frozen=True)
class _Order:
    """Counts of one order: sorted codes of n-grams and of their contexts.

    Attributes:
        grams, counts: code -> count of an n-gram; below the highest order, of the different tokens that come before it.
        contexts, totals, kinds: code -> sum of those counts, and how many different tokens follow.
        discount: what is taken from every count and handed to the shorter context.
    """

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray
    discount: float


class KneserNey:
    """Interpolated Kneser-Ney with one discount an order, n1 / (n1 + 2 n2) (Kneser and Ney 1995; Chen and Goodman 1999).

    Args:
        documents: token ids to count, each at least one token long; contexts do not cross documents.
        order: n; an n-gram must fit into 64 bits.
        vocab_size: token ids are smaller than this.
    Raises:
        OptionError: an order below 1, or n-grams that do not fit.
        InputError: no documents, or an id out of range.
    """

    def __init__(self, documents: Sequence[np.ndarray], *, order: int, vocab_size: int) -> None:
        if order < 1 or (vocab_size + 1) ** order >= 2**64:
            raise OptionError(f"order={order} with {vocab_size} tokens does not fit into 64 bits; choose a smaller order")
        self.order, self.vocab_size = order, vocab_size
        self._base = np.uint64(vocab_size + 1)  # digit 0 stands before the beginning
        codes = self._codes(documents, order)
        counts = np.ones(0, np.int64)
        self._orders: list[_Order] = []
        for size in range(order, 0, -1):
            if size == order:
                codes, counts = np.unique(codes, return_counts=True)
            else:  # each different longer gram counts once for what remains without its first token
                codes, counts = np.unique(codes % self._base ** np.uint64(size), return_counts=True)
            self._orders.append(self._count(codes, counts))

    def loss(self, documents: Sequence[np.ndarray]) -> float:
        """Mean negative log-probability of every token that has one before it, natural logarithm.

        Raises:
            InputError: no such token, or an id out of range.
        """
        codes = self._codes(documents, self.order)
        chance = np.full(len(codes), 1.0 / self.vocab_size)
        for size, order in zip(range(1, self.order + 1), reversed(self._orders), strict=True):
            gram = codes % self._base ** np.uint64(size)
            count = _look_up(order.grams, order.counts, gram)
            total = _look_up(order.contexts, order.totals, gram // self._base)
            kinds = _look_up(order.contexts, order.kinds, gram // self._base)
            known = total > 0
            mixed = np.maximum(count - order.discount, 0.0) + order.discount * kinds * chance
            chance = np.where(known, mixed / np.maximum(total, 1), chance)
        return float(-np.log(chance).mean())

    def _count(self, codes: np.ndarray, counts: np.ndarray) -> _Order:
        ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
        discount = ones / (ones + 2 * twos) if ones else 0.5
        contexts, where = np.unique(codes // self._base, return_inverse=True)
        totals = np.bincount(where, weights=counts).astype(np.int64)
        return _Order(codes, counts, contexts, totals, np.bincount(where), discount)

    def _codes(self, documents: Sequence[np.ndarray], size: int) -> np.ndarray:
        """The last `size` tokens up to each but the first of a document as one number; ids count from 1."""
        parts = []
        for ids in documents:
            digits = np.asarray(ids).astype(np.uint64) + np.uint64(1)
            if len(digits) and digits.max() > self.vocab_size:
                raise InputError(f"documents hold the token {int(digits.max()) - 1}; vocab_size is {self.vocab_size}")
            padded = np.concatenate([np.zeros(size, np.uint64), digits])
            code = np.zeros(len(digits), np.uint64)
            for back in range(size):
                code += padded[size - back : len(padded) - back] * self._base ** np.uint64(back)
            parts.append(code[1:])
        if not parts or not sum(map(len, parts)):
            raise InputError("documents hold nothing to predict; give texts of at least two tokens")
        return np.concatenate(parts)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Values of sorted keys, 0 where a key is absent."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
