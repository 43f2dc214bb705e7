"""Needles, chains and counts over one vocabulary: a context, then questions about it that can be cut off (after RULER)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from attnkit._core.checks import check_choice
from attnkit._core.errors import OptionError
from attnkit.training.data.packing import IGNORED
from attnkit.training.tasks.base import Examples, check_length
from attnkit.training.tasks.draw import distinct, places, shuffled

__all__ = ["KINDS", "Ruler"]

SET, ASK, FIRST, LAST, MOST = range(5)
_MARKS, _WIDTH = 5, 3
_COMMON = 8  # of so many tokens one is the most common value


@dataclass(frozen=True)
class Ruler:
    """A context with statements `set name value` among noise, then `questions` blocks of three tokens, the last the answer.

    single: one statement, asked for again and again. multikey: many; `ask name`. multivalue: two of every name;
    `first name` or `last name`. variables: `set other name` further on, and `ask other` wants the name's value. frequent: a
    context of values; `most most` wants the most common one. common: as many common values as there are questions; `most first`
    wants the first of them in the order of their tokens, `most value` the one after this value.

    Attributes:
        kinds: of KINDS; each example is of one of them, each as likely, so that one that stands there twice comes more often.
        questions: blocks at the end; what is before them never changes with what they ask.
        names, values, noise: numbers of tokens.
        spacing: tokens of the context for each statement, more than 3.
    Raises:
        OptionError: an unknown kind, or statements that would overlap.
    Source: tasks after Hsieh et al. 2024 (RULER), arXiv:2404.06654.
    """

    kinds: tuple[str, ...] = ("single", "multikey", "multivalue", "variables", "frequent", "common")
    questions: int = 4
    names: int = 32
    values: int = 32
    noise: int = 32
    spacing: int = 16
    name: ClassVar[str] = "ruler"

    def __post_init__(self) -> None:
        for kind in self.kinds:
            check_choice("kinds", kind, KINDS)
        if self.spacing <= _WIDTH:
            raise OptionError(f"spacing={self.spacing} is not allowed; a statement has {_WIDTH} tokens, choose more")

    @property
    def vocab_size(self) -> int:
        """Marks, names, values, noise."""
        return _MARKS + self.names + self.values + self.noise

    @property
    def chance(self) -> float:
        """One in as many as there are values."""
        return 1 / self.values

    def context(self, length: int) -> int:
        """Tokens before the first question of an example of `length` tokens."""
        return length - _WIDTH * self.questions

    def generate(self, seed: int, n: int, length: int) -> Examples:
        """n examples [n, length].

        Raises:
            OptionError: `length` has no room for two statements and the questions.
        """
        check_length(self.name, length, _WIDTH * (self.questions + 4))
        random = np.random.default_rng(seed)
        room = self.context(length)
        ids = random.integers(self._first_value + self.values, self.vocab_size, (n, length))
        chosen = random.integers(0, len(self.kinds), n)
        for number, kind in enumerate(self.kinds):
            rows = np.flatnonzero(chosen == number)
            if len(rows):
                context, blocks = _MAKERS[kind](self, random, ids[rows, :room])
                ids[rows] = np.concatenate([context, blocks.reshape(len(rows), -1)], 1)
        labels = np.full_like(ids, IGNORED)
        labels[:, room + 2 :: _WIDTH] = ids[:, room + 2 :: _WIDTH]
        return Examples(ids, labels)

    @property
    def _first_value(self) -> int:
        return _MARKS + self.names

    def _statements(self, room: int) -> int:
        """An even number."""
        return min(max(2, room // self.spacing // 2 * 2), self.names)


def _stated(task: Ruler, random: np.random.Generator, ids: np.ndarray, names: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """[n, room] with `set name source` for the columns of names and sources, in their order."""
    starts = places(random, len(ids), ids.shape[1], names.shape[1], _WIDTH)
    rows, ids = np.arange(len(ids))[:, None], ids.copy()
    for offset, part in enumerate((np.full_like(names, SET), names, sources)):
        ids[rows, starts + offset] = part
    return ids


def _blocks(marks: np.ndarray | int, names: np.ndarray | int, answers: np.ndarray) -> np.ndarray:
    return np.stack(np.broadcast_arrays(marks, names, answers), -1)


def _needles(task: Ruler, random: np.random.Generator, ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    n = len(ids)
    names = _MARKS + distinct(random, n, count, task.names)
    values = task._first_value + random.integers(0, task.values, (n, count))
    asked = random.integers(0, count, (n, task.questions))
    chosen = (np.take_along_axis(part, asked, 1) for part in (names, values))
    return _stated(task, random, ids, names, values), _blocks(ASK, *chosen)


def _single(task: Ruler, random: np.random.Generator, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _needles(task, random, ids, 1)


def _multikey(task: Ruler, random: np.random.Generator, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _needles(task, random, ids, task._statements(ids.shape[1]))


def _multivalue(task: Ruler, random: np.random.Generator, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n, count = len(ids), task._statements(ids.shape[1])
    names = _MARKS + distinct(random, n, count // 2, task.names)
    values = task._first_value + random.integers(0, task.values, (n, count))  # first ones, then last ones
    owner = shuffled(random, n, count) % (count // 2)  # which name each statement is about
    again = np.argsort(np.argsort(owner, 1, kind="stable"), 1) % 2  # whether it is the second of its name
    asked, last = random.integers(0, count // 2, (n, task.questions)), random.integers(0, 2, (n, task.questions))
    context = _stated(
        task, random, ids,
        np.take_along_axis(names, owner, 1), np.take_along_axis(values, owner + again * (count // 2), 1),
    )  # fmt: skip
    answers = np.take_along_axis(values, asked + last * (count // 2), 1)
    return context, _blocks(np.where(last, LAST, FIRST), np.take_along_axis(names, asked, 1), answers)


def _variables(task: Ruler, random: np.random.Generator, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n, count = len(ids), task._statements(ids.shape[1])
    chains = count // 2
    names = _MARKS + distinct(random, n, count, task.names)  # those with a value, then those with a name
    values = task._first_value + random.integers(0, task.values, (n, chains))
    owner = shuffled(random, n, count) % chains
    again = np.argsort(np.argsort(owner, 1, kind="stable"), 1) % 2
    sources = np.concatenate([values, names[:, :chains]], 1)
    place = owner + again * chains
    asked = random.integers(0, chains, (n, task.questions))
    context = _stated(task, random, ids, np.take_along_axis(names, place, 1), np.take_along_axis(sources, place, 1))
    return context, _blocks(ASK, np.take_along_axis(names, asked + chains, 1), np.take_along_axis(values, asked, 1))


def _frequent(task: Ruler, random: np.random.Generator, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n, room = ids.shape
    common = random.integers(0, task.values, (n, 1))
    count = room // _COMMON + room // task.values + 1
    others = (common + 1 + np.arange(room - count) % (task.values - 1)) % task.values  # all alike
    drawn = np.concatenate([np.repeat(common, count, 1), others], 1)
    context = task._first_value + np.take_along_axis(drawn, shuffled(random, n, room), 1)
    return context, _blocks(MOST, MOST, np.repeat(task._first_value + common, task.questions, 1))


def _common(task: Ruler, random: np.random.Generator, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n, room = ids.shape
    size = task.questions
    count = max(2, room // (2 * size))  # of each common value; the others share the other half
    left, others = room - count * size, task.values - size
    if others < 1 or left < 0 or count <= -(-left // others):
        raise OptionError(
            f"kinds='common' is not possible with questions={size}, values={task.values} and {room} tokens of context; "
            f"ask fewer questions"
        )
    order = distinct(random, n, task.values, task.values)
    common = np.sort(order[:, :size], 1)
    drawn = np.concatenate([np.repeat(common, count, 1), order[:, size + np.arange(left) % others]], 1)
    context = task._first_value + np.take_along_axis(drawn, shuffled(random, n, room), 1)
    answers = task._first_value + common
    before = np.concatenate([np.full((n, 1), FIRST), answers[:, :-1]], 1)
    return context, _blocks(MOST, before, answers)


_MAKERS: dict[str, Callable[[Ruler, np.random.Generator, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "variables": _variables,
    "frequent": _frequent,
    "common": _common,
}
KINDS = tuple(_MAKERS)
