"""Cache methods written in one word, "adakv:snapkv:window=32@0.25", as command lines take them."""

import json
from typing import Any

from attnkit._core.errors import OptionError
from attnkit.kv import scorers
from attnkit.kv.pressing import Chain, Press
from attnkit.kv.registry import build

__all__ = ["RATIO", "parse", "write"]

RATIO = 0.5


def parse(text: str) -> Press | Chain:
    """Make a press of NAME[:OPTION=VALUE]..[@RATIO].

    NAME is a base method with wrappers before it. Presses that run one after another are joined by "+", each with options of
    its own; the ratio at the end is that of all. Values are JSON (numbers, true, lists) or else strings.

    Raises:
        OptionError: an unknown name or option, a value outside its range, or a ratio that is no number.

    >>> parse("adakv:snapkv:window=32@0.25").to_dict()
    {'name': 'adakv:snapkv', 'ratio': 0.25, 'window': 32}
    """
    scorers.load()
    body, at, number = text.rpartition("@")
    ratio = RATIO
    if not at:
        body = text
    else:
        try:
            ratio = float(number)
        except ValueError:
            raise OptionError(f"{text!r}: {number!r} is no ratio; write NAME@0.25 to remove a quarter of the keys") from None
    presses = tuple(build(name, ratio, options) for name, options in map(_part, body.split("+")))
    return presses[0] if len(presses) == 1 else Chain(presses)


def write(press: Press | Chain) -> str:
    """The press as `parse` reads it; the ratio always stands there.

    >>> write(parse("snapkv+decode:tova:target=64"))
    'snapkv+decode:tova:target=64@0.5'
    """
    presses = press.presses if isinstance(press, Chain) else (press,)
    words = [":".join([each.spec, *(f"{name}={_value(value)}" for name, value in each.options)]) for each in presses]
    return f"{'+'.join(words)}@{presses[0].ratio:g}"


def _part(text: str) -> tuple[str, dict[str, Any]]:
    words = text.split(":")
    names = [word for word in words if "=" not in word]
    given = (word.partition("=") for word in words if "=" in word)
    return ":".join(names), {name: _read(value) for name, _, value in given}


def _read(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
