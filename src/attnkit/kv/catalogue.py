"""What cache methods there are, in words: for `attnkit kv list` and the documentation."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnkit._core.errors import OptionError
from attnkit.kv import scorers
from attnkit.kv.pressing import press
from attnkit.kv.registry import ALIASES, BASES, WRAPPERS

__all__ = ["About", "aliases", "bases", "methods", "wrappers"]

_WORDS = {
    "hidden": "hidden states",
    "moments": "query moments",
    "queries": "one pass",
    "replay": "second reading",
    "rope": "rotation",
}


@dataclass(frozen=True)
class About:
    """A method in words.

    Attributes:
        name: by which it is asked for.
        summary: the first line of its documentation.
        source: paper, or empty.
        needs: what it wants of the model or from its user.
        options: names and defaults.
    """

    name: str
    summary: str
    source: str
    needs: tuple[str, ...]
    options: dict[str, Any]


def methods(*, ready: bool = False) -> tuple[str, ...]:
    """The names of the base methods, sorted.

    Args:
        ready: only those that need no weights or other options, which are all that `press(name)` makes.
    """
    scorers.load()
    return tuple(name for name in sorted(BASES) if not ready or _makes(name))


def bases() -> tuple[About, ...]:
    """All base methods, by their names."""
    ready = set(methods(ready=True))
    found = []
    for name in methods():
        method = BASES[name]
        options = _options(method)
        if name in ready:
            needs = tuple(_WORDS[need] for need in sorted(press(name).needs))
        else:
            needs = (f"{next(option for option, value in options.items() if value is None)}=FILE",)
        found.append(_about(name, method, options, needs))
    return tuple(found)


def wrappers() -> tuple[About, ...]:
    """All wrappers, by their names."""
    scorers.load()
    return tuple(_about(name, WRAPPERS[name], _options(WRAPPERS[name], skip=1), ()) for name in sorted(WRAPPERS))


def aliases() -> dict[str, str]:
    """Other names -> specs."""
    scorers.load()
    return dict(ALIASES)


def _makes(name: str) -> bool:
    try:
        press(name)
    except OptionError:
        return False
    return True


def _options(function: Callable[..., Any], skip: int = 0) -> dict[str, Any]:
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    return {each.name: each.default for each in parameters}


def _about(name: str, function: Callable[..., Any], options: dict[str, Any], needs: tuple[str, ...]) -> About:
    text = inspect.cleandoc(function.__doc__ or "")
    source = re.search(r"Source: (.*?)\.?$", text, flags=re.MULTILINE)
    return About(name, text.partition("\n")[0], source[1] if source else "", needs, options)
