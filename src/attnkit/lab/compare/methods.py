"""The methods that `attnkit compare` knows; another one is one more line at the end of this file."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnkit._core.registry import Registry

if TYPE_CHECKING:
    from attnkit.inference import Policy

__all__ = ["BASELINE", "METHODS", "Method", "describe", "select"]

BASELINE = "dense"
SINK = 4


@dataclass(frozen=True)
class Method:
    """A way to read a long context.

    Attributes:
        name: in METHODS and on the command line.
        summary: one line.
        policy: length of the context in tokens -> what `attnkit.inference.apply` switches on.
        default: whether it runs when no methods are named.
        shares_dense_prefill: whether reading the prompt is dense, so that it can start from a copy of dense's cache.
    """

    name: str
    summary: str
    policy: Callable[[int], "Policy"]
    default: bool = True
    shares_dense_prefill: bool = False


METHODS: Registry[Method] = Registry("method")


def select(names: Sequence[str] | None) -> tuple[Method, ...]:
    """The methods to run, the baseline always among them and first.

    Args:
        names: None means the default ones, ("all",) all of them.
    Raises:
        OptionError: an unknown name.
    """
    if names is None:
        return tuple(method for method in METHODS.values() if method.default)
    if tuple(names) == ("all",):
        return METHODS.values()
    return tuple(METHODS[name] for name in dict.fromkeys([BASELINE, *names]))


def describe(policy: "Policy") -> str:
    """A policy in a few words, options that are off left out: `Window(window=512, sink=4)`."""
    parts = [getattr(policy, field.name) for field in dataclasses.fields(policy)]
    written = [_written(part) for part in parts if part is not None]
    return " + ".join(written if len(written) == 1 else [text for text in written if text != "Dense()"])


def _written(part: Any) -> str:
    options = [
        f"{field.name}={getattr(part, field.name)!r}"
        for field in dataclasses.fields(part)
        if getattr(part, field.name) is not False and getattr(part, field.name) is not None
    ]
    return f"{type(part).__name__}({', '.join(options)})"


def _window(*, rerotate: bool = False, dense_prefill: bool = False) -> Callable[[int], "Policy"]:
    """A quarter of the context: short enough to lose something, long enough to keep most of the fluency."""

    def policy(length: int) -> "Policy":
        from attnkit.inference import Policy, Window

        window = max(length // 4, 1)
        return Policy(prefill=Window(window=window, sink=SINK, rerotate=rerotate, dense_prefill=dense_prefill))

    return policy


def _position(name: str) -> Callable[[int], "Policy"]:
    def policy(length: int) -> "Policy":
        from attnkit.inference import POSITIONS, Policy

        return Policy(position=POSITIONS[name]())

    return policy


def _dense(length: int) -> "Policy":
    from attnkit.inference import Policy

    return Policy()


for _method in (
    Method(BASELINE, "every token sees all earlier ones: the baseline", _dense, shares_dense_prefill=True),
    Method("window", "the last quarter of the context and 4 sinks, original positions", _window()),
    Method("window-rerotate", "the same with positions counted inside the cache (StreamingLLM)", _window(rerotate=True)),
    Method("window-decode", "dense prompt, then the window", _window(dense_prefill=True), shares_dense_prefill=True),
    Method("pi", "positions divided by 2", _position("pi")),
    Method("ntk", "rotary base raised for twice the length", _position("ntk")),
    Method("yarn", "YaRN for twice the length", _position("yarn")),
):
    METHODS.register(_method.name, _method)
