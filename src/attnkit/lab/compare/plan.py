"""Which inputs there are, and in which order methods read them."""

from collections.abc import Sequence
from dataclasses import dataclass

from attnkit.lab.compare.methods import BASELINE, Method
from attnkit.lab.compare.passkey import DEPTHS

__all__ = ["Input", "inputs", "order"]


@dataclass(frozen=True)
class Input:
    """One input of the protocol.

    Attributes:
        index: among all inputs.
        length: tokens.
        trial: which window of the text, or which key at this depth.
        depth: of the pass-key; None for a text window.
    """

    index: int
    length: int
    trial: int
    depth: float | None = None

    def __str__(self) -> str:
        kind = "text" if self.depth is None else f"pass-key at {100 * self.depth:.0f} %"
        return f"{self.length} tokens, {kind}, trial {self.trial + 1}"

    def key(self, method: Method) -> str:
        """Names the step in which `method` reads this input."""
        return f"{self}: {method.name}"


def inputs(lengths: Sequence[int], trials: int) -> list[Input]:
    """All inputs: for each length and trial a text window, then a pass-key at each depth."""
    kinds = [(length, trial, depth) for length in lengths for trial in range(trials) for depth in (None, *DEPTHS)]
    return [Input(index, *kind) for index, kind in enumerate(kinds)]


def order(item: Input, methods: Sequence[Method]) -> list[Method]:
    """Methods in their order for one input: rotated by its index; on text the baseline comes first."""
    shift = item.index % len(methods)
    rotated = [*methods[shift:], *methods[:shift]]
    if item.depth is None:
        rotated.sort(key=lambda method: method.name != BASELINE)
    return rotated
