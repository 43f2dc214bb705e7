"""The methods that `attnkit compare` knows; another one is one more line at the end of this file, or a press of the cache."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from attnkit._core.registry import Registry

if TYPE_CHECKING:
    from attnkit.inference import Policy

__all__ = ["BASELINE", "METHODS", "Method", "describe", "named", "select"]

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
        press: what compresses the cache, without its ratio; None where nothing does.
        ratio: the fraction that it removes.
        codec: how the cache writes keys and values, a name of `attnkit.kv.cache.CODECS`; None leaves them as they are.
    """

    name: str
    summary: str
    policy: Callable[[int], "Policy"]
    default: bool = True
    shares_dense_prefill: bool = False
    press: str | None = None
    ratio: float | None = None
    codec: str | None = None


METHODS: Registry[Method] = Registry("method")


def select(names: Sequence[str] | None) -> tuple[Method, ...]:
    """The methods to run, the baseline always among them and first.

    Args:
        names: None means the default ones, ("all",) all of METHODS and all base methods of the cache that need no files.
    Raises:
        OptionError: an unknown name, or a press that cannot be made.
    """
    if names is None:
        return tuple(method for method in METHODS.values() if method.default)
    if tuple(names) == ("all",):
        from attnkit import kv

        names = [*METHODS, *kv.methods(ready=True)]
    return tuple({method.name: method for method in map(named, [BASELINE, *names])}.values())


def named(text: str) -> Method:
    """A method by its name in METHODS, or a press: NAME[:OPTION=VALUE]..[:codec=CODEC][@RATIO], see `attnkit.kv.parse`.

    `dense:codec=int8` keeps everything and writes it in 8 bits.

    Raises:
        OptionError: an unknown name, option or codec.
    """
    from attnkit import kv
    from attnkit.kv.cache import CODECS

    codec = re.search(r":codec=([^:+@]*)", text)
    body = text if codec is None else text.replace(codec[0], "", 1)
    if codec is not None:
        CODECS[codec[1]]  # names the ones there are
    if body == BASELINE and codec is not None:
        return Method(text, f"everything, in {codec[1]}", _dense, default=False, codec=codec[1])
    if codec is None and not re.search("[:+@]", text):
        known: Registry[Method] = Registry("method")
        for method in METHODS.values():
            known.register(method.name, method)
        for name in (*kv.methods(), *kv.catalogue.aliases()):
            known.register_later(name, partial(_pressed, name, None))
        return known[text]
    return _pressed(body, None if codec is None else codec[1])


def _pressed(text: str, codec: str | None) -> Method:
    from attnkit import kv

    press = kv.parse(text)
    spec, _, ratio = kv.write(press).rpartition("@")
    name = f"{spec}@{ratio}" if codec is None else f"{spec}:codec={codec}@{ratio}"

    def policy(length: int) -> "Policy":
        from attnkit.inference import Policy

        return Policy(cache=press)

    return Method(name, f"{spec} removes {float(ratio):.0%}", policy, False, press=spec, ratio=float(ratio), codec=codec)


def describe(policy: "Policy") -> str:
    """A policy in a few words, options that are off left out: `Window(window=512, sink=4)`."""
    parts = [getattr(policy, field.name) for field in dataclasses.fields(policy)]
    written = [_written(part) for part in parts if part is not None]
    return " + ".join(written if len(written) == 1 else [text for text in written if text != "Dense()"])


def _written(part: Any) -> str:
    if hasattr(part, "after_pass"):  # a press: its fields are its parts
        from attnkit import kv

        return str(kv.write(part))
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
