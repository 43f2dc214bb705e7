"""One typed registry for operators, methods, assets and whatever else is looked up by name."""

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from attnkit._core.errors import OptionError

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to values, in the order of registration; a duplicate name raises, an unknown one says what is near.

    Args:
        kind: what the values are, in the singular: it words the messages ("unknown method 'windw'").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._values: dict[str, T] = {}
        self._makers: dict[str, Callable[[], T]] = {}  # of values that nobody has asked for yet
        self._names: list[str] = []

    def register(self, name: str, value: T) -> T:
        """Add a value and return it.

        Raises:
            OptionError: the name is taken.
        """
        self._claim(name)
        self._values[name] = value
        return value

    def register_later(self, name: str, make: Callable[[], T]) -> None:
        """Add a value that is made when somebody first asks for it.

        Raises:
            OptionError: the name is taken.
        """
        self._claim(name)
        self._makers[name] = make

    def _claim(self, name: str) -> None:
        if name in self._names:
            raise OptionError(f"{self.kind} {name!r} is registered twice; choose another name")
        self._names.append(name)

    def __getitem__(self, name: str) -> T:
        if name in self._values:
            return self._values[name]
        if name in self._makers:
            return self._values.setdefault(name, self._makers.pop(name)())
        near = difflib.get_close_matches(name, self._names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(f"unknown {self.kind} {name!r}; {hint}known: {', '.join(self._names) or 'none'}")

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def values(self) -> tuple[T, ...]:
        """All values, in the order of registration."""
        return tuple(self[name] for name in self._names)
