"""One typed registry for operators, methods, assets and whatever else is looked up by name."""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from attnkit._core.errors import OptionError

__all__ = ["Registry"]

T = TypeVar("T")


@dataclass(frozen=True)
class _Later(Generic[T]):
    """A value that nobody has asked for yet."""

    make: Callable[[], T]


class Registry(Generic[T]):
    """Names to values, in the order of registration; a duplicate name raises, an unknown one says what is near.

    Args:
        kind: what the values are, in the singular: it words the messages ("unknown method 'windw'").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._values: dict[str, T | _Later[T]] = {}

    def register(self, name: str, value: T) -> T:
        """Add a value and return it.

        Raises:
            OptionError: the name is taken.
        """
        self._add(name, value)
        return value

    def register_later(self, name: str, make: Callable[[], T]) -> None:
        """Add a value that is made when somebody first asks for it.

        Raises:
            OptionError: the name is taken.
        """
        self._add(name, _Later(make))

    def _add(self, name: str, value: T | _Later[T]) -> None:
        if name in self._values:
            raise OptionError(f"{self.kind} {name!r} is registered twice; choose another name")
        self._values[name] = value

    def __getitem__(self, name: str) -> T:
        if name not in self._values:
            near = difflib.get_close_matches(name, self._values, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise OptionError(f"unknown {self.kind} {name!r}; {hint}known: {', '.join(self._values) or 'none'}")
        value = self._values[name]
        if isinstance(value, _Later):
            value = self._values[name] = value.make()
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def values(self) -> tuple[T, ...]:
        """All values, in the order of registration."""
        return tuple(self[name] for name in self._values)
