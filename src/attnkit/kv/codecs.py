"""Codecs: how pages are written."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from attnkit._core.errors import OptionError

__all__ = ["Codec", "Raw", "named"]


class Codec(Protocol):
    """How keys and values of a page are written."""

    @property
    def page_size(self) -> int: ...  # noqa: D102

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]: ...  # noqa: D102

    def decode(self, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]: ...  # noqa: D102


@dataclass(frozen=True)
class Raw:
    """As they are."""

    page_size: int = 16

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """As they are."""
        return {"keys": keys, "values": values}

    def decode(self, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As they are."""
        return rows["keys"], rows["values"]


def named(name: str) -> Codec:
    """By name."""
    if name != "raw":
        raise OptionError(f"unknown codec {name!r}")
    return Raw()
