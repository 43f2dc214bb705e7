"""Synthetic tasks with exact scores: what a model must be able to do, without a text."""

from attnkit._core.registry import Registry
from attnkit.training.tasks.base import Examples, Score, Task, score
from attnkit.training.tasks.copying import Copying
from attnkit.training.tasks.needle import MultiKeyNeedle, Needle
from attnkit.training.tasks.permutations import PermutationWords
from attnkit.training.tasks.recall import AssociativeRecall
from attnkit.training.tasks.rows import TaskData, TaskRows
from attnkit.training.tasks.ruler import Ruler
from attnkit.training.tasks.variables import VariableTracking

__all__ = [
    "TASKS",
    "AssociativeRecall",
    "Copying",
    "Examples",
    "MultiKeyNeedle",
    "Needle",
    "PermutationWords",
    "Ruler",
    "Score",
    "Task",
    "TaskData",
    "TaskRows",
    "VariableTracking",
    "score",
]

TASKS: Registry[type[Task]] = Registry("task")
for _task in (AssociativeRecall, Needle, MultiKeyNeedle, VariableTracking, Copying, PermutationWords, Ruler):
    TASKS.register(_task.name, _task)
