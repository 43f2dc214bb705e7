"""What a synthetic task is: examples whose answers are known, and an exact score."""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from attnkit._core.errors import InputError, OptionError, ShapeError
from attnkit.training.data.packing import IGNORED

__all__ = ["Examples", "Score", "Task", "check_length", "score"]


@dataclass(frozen=True)
class Examples:
    """Examples of one length.

    Attributes:
        input_ids: [n, T] int64.
        labels: [n, T] int64; where an answer is due, the token that a model which has read everything *before* this position
            must predict (as labels of causal language models are), -100 elsewhere. Never at position 0.
    """

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Score:
    """How many answers were right.

    Attributes:
        right, answers: tokens.
        solved, examples: examples all of whose answers were right.
    """

    right: int
    answers: int
    solved: int
    examples: int

    @property
    def accuracy(self) -> float:
        """Share of answers that were right."""
        return self.right / self.answers

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.right + other.right,
            self.answers + other.answers,
            self.solved + other.solved,
            self.examples + other.examples,
        )


@runtime_checkable
class Task(Protocol):
    """A registered task; its fields say how hard it is."""

    name: ClassVar[str]

    @property
    def vocab_size(self) -> int:
        """Token ids are smaller than this."""
        ...

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the tokens that are answers."""
        ...

    def generate(self, seed: int, n: int, length: int) -> Examples:
        """n examples of `length` tokens; equal arguments give equal examples."""
        ...


def score(predictions: np.ndarray, examples: Examples) -> Score:
    """Count exactly.

    Args:
        predictions: [n, T], at each position the token that was predicted for it, from what stands before it.
        examples: what was asked.
    Raises:
        ShapeError: another shape.
        InputError: the examples ask for nothing.
    """
    if predictions.shape != examples.labels.shape:
        raise ShapeError(f"predictions have shape {predictions.shape}; the examples are {examples.labels.shape}")
    asked = examples.labels != IGNORED
    if not asked.any():
        raise InputError("the examples have no answers; every label is -100")
    right = (predictions == examples.labels) & asked
    return Score(int(right.sum()), int(asked.sum()), int((right == asked).all(1).sum()), len(asked))


def check_length(task: str, length: int, least: int, *, multiple: int = 1) -> None:
    """Refuse a length that a task cannot fill.

    Raises:
        OptionError: shorter than `least`, or no multiple of `multiple`.
    """
    if length < least or length % multiple:
        rule = f"at least {least}" + (f" and a multiple of {multiple}" if multiple > 1 else "")
        raise OptionError(f"length={length} is not possible for {task}; choose {rule} tokens")
