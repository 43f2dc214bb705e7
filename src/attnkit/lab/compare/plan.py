"""Which inputs there are, and in which order methods read them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from attnkit.lab.compare.methods import BASELINE, Method
from attnkit.lab.compare.prompts import DEPTHS
from attnkit.lab.compare.questions import ASKED

__all__ = ["DEFAULT", "TASKS", "Input", "inputs", "order"]

TASKS = ("text", *ASKED)
DEFAULT = ("text", "needle")


@dataclass(frozen=True)
class Input:
    """One input of the protocol.

    Attributes:
        turn: how many inputs of its kind come before it.
        length: tokens.
        trial: which window of the text, or which question at this depth.
        depth: of what is asked for; None for a text window.
        task: of TASKS.
    """

    turn: int
    length: int
    trial: int
    depth: float | None = None
    task: str = "text"

    def __str__(self) -> str:
        name = "pass-key" if self.task == "needle" else self.task
        kind = name if self.depth is None else f"{name} at {100 * self.depth:.0f} %"
        return f"{self.length} tokens, {kind}, trial {self.trial + 1}"

    def key(self, method: Method) -> str:
        """Names the step in which `method` reads this input."""
        return f"{self}: {method.name}"


def inputs(lengths: Sequence[int], trials: int, tasks: Sequence[str] = DEFAULT) -> list[Input]:
    """All inputs: for each length and trial a text window ("text"), then a question of each other task at each depth."""
    depths: dict[str, tuple[float | None, ...]] = {task: (None,) if task == "text" else DEPTHS for task in tasks}
    turns = {True: itertools.count(), False: itertools.count()}
    return [
        Input(next(turns[depth is None]), length, trial, depth, task)
        for length in lengths
        for trial in range(trials)
        for task in tasks
        for depth in depths[task]
    ]


def order(item: Input, methods: Sequence[Method]) -> list[Method]:
    """Methods in their order for one input, rotated from turn to turn; on text the baseline stays first."""
    fixed = [method for method in methods if item.depth is None and method.name == BASELINE]
    others = [method for method in methods if method not in fixed]
    shift = item.turn % max(len(others), 1)
    return [*fixed, *others[shift:], *others[:shift]]
