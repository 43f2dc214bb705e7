"""The names of compression methods, and how a name with options becomes a press.

A spec is a base method with wrappers before it, "adakv:snapkv", and several presses run one after another with "+",
"snapkv+decode:tova". Options go to the base and the wrappers by the names of their arguments.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from attnkit._core.errors import OptionError
from attnkit._core.registry import Registry

if TYPE_CHECKING:
    from attnkit.kv.pressing import Press

__all__ = ["ALIASES", "BASES", "WRAPPERS", "base", "build", "scorer", "wrapper"]

BASES: "Registry[Callable[..., Press]]" = Registry("cache method")
WRAPPERS: "Registry[Callable[..., Press]]" = Registry("wrapper of cache methods")
ALIASES: dict[str, str] = {}
"""Other names of a spec."""

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class _OfScorer:
    """A base method that is a scorer and nothing else: per-head top-k after the prefill."""

    scorer: type

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.scorer)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.scorer.__doc__

    def __call__(self, **options: Any) -> "Press":
        from attnkit.kv.pressing import Press

        return Press(scorer=self.scorer(**options))


def scorer(name: str) -> Callable[[C], C]:
    """Class decorator: the scorer is a base method of this name."""

    def register(cls: C) -> C:
        BASES.register(name, _OfScorer(cls))
        return cls

    return register


def base(name: str) -> Callable[[F], F]:
    """Decorator of a function options -> Press: a base method that is more than a scorer."""

    def register(function: F) -> F:
        BASES.register(name, function)
        return function

    return register


def wrapper(name: str) -> Callable[[F], F]:
    """Decorator of a function (press, **options) -> Press."""

    def register(function: F) -> F:
        WRAPPERS.register(name, function)
        return function

    return register


def build(spec: str, ratio: float, options: Mapping[str, Any]) -> "Press":
    """One press of a spec without "+".

    Raises:
        OptionError: an unknown name, an option that nothing in the spec has, or a value outside its range.
    """
    *outer, name = ALIASES.get(spec, spec).split(":")
    left = dict(options)
    allowed: list[str] = []
    press = BASES[name](**_taken(BASES[name], left, allowed))
    press = replace(press, ratio=ratio)
    for each in reversed(outer):
        press = WRAPPERS[each](press, **_taken(WRAPPERS[each], left, allowed, skip=1))
    if left:
        known = ", ".join(allowed) or "none"
        raise OptionError(f"{spec!r} has no option {sorted(left)[0]!r}; it has {known}")
    return replace(press, spec=spec, options=tuple(sorted(options.items())))


def _taken(function: Callable[..., Any], left: dict[str, Any], allowed: list[str], *, skip: int = 0) -> dict[str, Any]:
    names = list(inspect.signature(function).parameters)[skip:]
    allowed += [name for name in names if name not in allowed]
    return {name: left.pop(name) for name in names if name in left}
