"""Which inputs there are, and in which order methods read them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from attnkit.lab.compare.methods import BASELINE, Method
from attnkit.lab.compare.passkey import DEPTHS

__all__ = ["TASKS", "Input", "inputs", "order"]

TASKS = ("text", "needle")


@dataclass(frozen=True)
class Input:
    """One input of the protocol.

    Attributes:
        turn: how many inputs of its kind come before it.
        length: tokens.
        trial: which window of the text, or which key at this depth.
        depth: of the pass-key; None for a text window.
    """

    turn: int
    length: int
    trial: int
    depth: float | None = None

    def __str__(self) -> str:
        kind = "text" if self.depth is None else f"pass-key at {100 * self.depth:.0f} %"
        return f"{self.length} tokens, {kind}, trial {self.trial + 1}"

    def key(self, method: Method) -> str:
        """Names the step in which `method` reads this input."""
        return f"{self}: {method.name}"


def inputs(lengths: Sequence[int], trials: int, tasks: Sequence[str] = TASKS) -> list[Input]:
    """All inputs: for each length and trial a text window ("text"), then a pass-key at each depth ("needle")."""
    depths: list[float | None] = [*([None] if "text" in tasks else []), *(DEPTHS if "needle" in tasks else [])]
    turns = {True: itertools.count(), False: itertools.count()}
    return [
        Input(next(turns[depth is None]), length, trial, depth)
        for length in lengths
        for trial in range(trials)
        for depth in depths
    ]


def order(item: Input, methods: Sequence[Method]) -> list[Method]:
    """Methods in their order for one input, rotated from turn to turn; on text the baseline stays first."""
    fixed = [method for method in methods if item.depth is None and method.name == BASELINE]
    others = [method for method in methods if method not in fixed]
    shift = item.turn % max(len(others), 1)
    return [*fixed, *others[shift:], *others[:shift]]
