"""A task as training data: row i is a batch of fresh examples, a function of (task, seed, i)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from attnkit._core.errors import OptionError
from attnkit.training.data.packing import IGNORED, Row, Work
from attnkit.training.tasks.base import Examples, Task

__all__ = ["TaskData", "TaskRows"]


_JOINED = 0.6  # share of the rows after which every length is drawn


class TaskRows(Dataset[Row]):
    """Batches of one length each; a batch has about `row_tokens` tokens.

    Training begins with the shortest length, and the others join one after the other over the first 60 % of the rows: what a
    model has learnt on short examples carries over to long ones, on which it would find nothing for a long time. (MQAR at 64
    to 256 tokens: solved in 2,000 steps, and without this not in 3,600.) Validation takes the lengths in turns.

    Args:
        task: makes the examples.
        lengths: tokens of an example.
        row_tokens: tokens of a batch; at least one example is made.
        rows: how many batches there are.
        seed: of everything.
        validation: other examples than those that training sees.
    Raises:
        OptionError: no lengths, or one that the task cannot fill.
    """

    def __init__(
        self, task: Task, lengths: Sequence[int], *, row_tokens: int, rows: int, seed: int, validation: bool = False
    ) -> None:
        if not lengths:
            raise OptionError("lengths is empty; give tokens of an example, for example 64,128")
        self.task, self.lengths, self.row_tokens = task, tuple(sorted(lengths)), row_tokens
        self._rows, self._seed, self._validation = rows, seed, validation
        self._targets = {length: int((task.generate(0, 1, length).labels != IGNORED).sum()) for length in lengths}

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> Row:
        examples = self.examples(index)
        return {"input_ids": torch.from_numpy(examples.input_ids), "labels": torch.from_numpy(examples.labels)}

    def examples(self, index: int) -> Examples:
        """The examples of a row, as the task's score wants them."""
        seed = int(self._random(index).integers(2**63))
        return self.task.generate(seed, self._count(index), self._length(index))

    def work(self, index: int) -> Work:
        """What row `index` asks of a model."""
        count, length = self._count(index), self._length(index)
        return Work(count * length, count * self._targets[length], count * length * length)

    def _random(self, index: int) -> np.random.Generator:
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        return np.random.default_rng([self._seed, int(self._validation), index])

    def _length(self, index: int) -> int:
        if self._validation:
            return self.lengths[index % len(self.lengths)]
        joined = min(len(self.lengths), 1 + int(index / (_JOINED * self._rows) * len(self.lengths)))
        return self.lengths[np.random.default_rng([self._seed, index, 2]).integers(joined)]

    def _count(self, index: int) -> int:
        return max(1, self.row_tokens // self._length(index))


@dataclass(frozen=True)
class TaskData:
    """A task with its lengths and sizes: what `make_trainer` trains on.

    Attributes:
        train, validation: rows.
        vocab_size: token ids are smaller than this.
        max_length: the longest example.
        facts: what a result file says about the data.
    """

    train: TaskRows
    validation: TaskRows
    vocab_size: int
    max_length: int
    facts: Mapping[str, Any]

    @classmethod
    def make(
        cls, task: Task, lengths: Sequence[int], *, row_tokens: int, rows: int, seed: int, validation_rows: int
    ) -> "TaskData":
        """Training and validation rows of a task; `validation_rows` batches of every length are kept apart."""
        return cls(
            train=TaskRows(task, lengths, row_tokens=row_tokens, rows=rows, seed=seed),
            validation=TaskRows(
                task, lengths, row_tokens=row_tokens, rows=validation_rows * len(lengths), seed=seed, validation=True
            ),
            vocab_size=task.vocab_size,
            max_length=max(lengths),
            facts={"task": task.name, "lengths": list(lengths), "row_tokens": row_tokens, **vars(task)},
        )
