"""Schedules: when a press compresses a layer, and to how many keys."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.kv.budgets import kept_of
from attnkit.kv.registry import wrapper

__all__ = ["AfterPrefill", "Every", "Schedule"]


class Schedule(Protocol):
    """When, and how much.

    Attributes:
        decodes: whether it ever compresses while decoding; where it does not, no queries are kept then.
    """

    decodes: ClassVar[bool]

    def due(self, *, phase: str, since: int) -> bool:
        """Whether to compress after a pass.

        Args:
            phase: "prefill" in the pass that completes the context, "decode" after it.
            since: tokens that came since the prefill ended or this press last compressed.
        """
        ...

    def kept(self, length: int | Tensor, ratio: float, seen: int) -> int | Tensor:
        """What a head keeps of its `length` real tokens ([B, Hkv] int64 or one number), `seen` tokens having come."""
        ...


@dataclass(frozen=True)
class AfterPrefill:
    """Once, when the context has been read."""

    decodes: ClassVar[bool] = False

    def due(self, *, phase: str, since: int) -> bool:
        """At the end of the prefill."""
        del since
        return phase == "prefill"

    def kept(self, length: int | Tensor, ratio: float, seen: int) -> int | Tensor:
        """The share that the ratio leaves."""
        del seen
        return kept_of(length, ratio)


@dataclass(frozen=True)
class Every:
    """Every `interval` tokens of decoding.

    Args:
        interval: tokens between two compressions, 1 or more.
        target: tokens that a head keeps; None keeps the share of the tokens seen that the press's ratio leaves.
    """

    decodes: ClassVar[bool] = True
    interval: int = 512
    target: int | None = 2048

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise OptionError(f"interval={self.interval} is not allowed; it counts tokens, 1 or more")
        if self.target is not None and self.target < 1:
            raise OptionError(f"target={self.target} is not allowed; it counts tokens, 1 or more, or is None")

    def due(self, *, phase: str, since: int) -> bool:
        """While decoding, when the interval is over."""
        return phase == "decode" and since >= self.interval

    def kept(self, length: int | Tensor, ratio: float, seen: int) -> int | Tensor:
        """The target, or all where there are fewer."""
        kept = kept_of(seen, ratio) if self.target is None else self.target
        assert isinstance(kept, int)
        return min(kept, length) if isinstance(length, int) else length.clamp(max=kept)


@wrapper("decode")
def _decode(press: Any, interval: int = 512, target: int | None = 2048, buffer: int = 256) -> Any:
    """Compresses every `interval` tokens of decoding, down to `target`, instead of after the prefill."""
    return replace(press, schedule=Every(interval, target), buffer=buffer)
