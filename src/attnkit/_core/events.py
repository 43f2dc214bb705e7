"""What a running instrument tells whoever watches it."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Event", "Kind"]

Kind = Literal["plan", "phase", "warning", "step"]


@dataclass(frozen=True)
class Event:
    """What a running measurement tells.

    Attributes:
        kind: "phase" (something slow begins), "warning", "plan" (once, when steps begin), or "step" (one was finished).
        text: one line.
        done, total: steps, those found by resuming among the done ones.
    """

    kind: Kind
    text: str
    done: int
    total: int
