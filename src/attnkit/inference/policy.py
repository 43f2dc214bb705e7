"""A policy: how a model reads a long context, as one value."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

from attnkit import kv
from attnkit._core.errors import OptionError, PolicyError
from attnkit._core.registry import Registry
from attnkit.inference import positions as _positions
from attnkit.inference import prefill as _prefill
from attnkit.inference.methods import (
    CORRECTIONS,
    POSITIONS,
    PREFILLS,
    CachePolicy,
    Correction,
    Position,
    Prefill,
)

__all__ = ["CORRECTIONS", "POSITIONS", "PREFILLS", "Policy", "available", "named"]

SCHEMA = "attnkit.policy/1"
_SLOTS: dict[str, Registry[Callable[[], Any]]] = {
    "prefill": cast("Registry[Callable[[], Any]]", PREFILLS),
    "position": cast("Registry[Callable[[], Any]]", POSITIONS),
    "correction": cast("Registry[Callable[[], Any]]", CORRECTIONS),
}
_FILLED = (_positions, _prefill)  # importing them registers their methods


@dataclass(frozen=True, init=False)
class Policy:
    """What `apply` switches on: at most one method of each kind, each an object or its registered name.

    Args:
        prefill: what each query sees, "dense" or "window" or an object with its options, `Window(window=512)`.
        position: how positions rotate, "pi", "ntk", "yarn" or an object; None leaves them as they are.
        correction: what repairs a sparse prefill; None is none.
        cache: what happens to stored keys, "snapkv" or what `attnkit.kv.press("snapkv", ratio=0.7)` returns; None keeps them.
    Raises:
        OptionError: an unknown name.
        PolicyError: an object that is not registered as a method of its kind, or methods that exclude each other; the
            message names the rule.

    >>> Policy(prefill="window").prefill
    Window(window=1024, sink=4, rerotate=False, dense_prefill=False)
    """

    prefill: Prefill
    position: Position | None
    correction: Correction | None
    cache: CachePolicy | None

    def __init__(
        self,
        *,
        prefill: Prefill | str = "dense",
        position: Position | str | None = None,
        correction: Correction | str | None = None,
        cache: CachePolicy | str | None = None,
    ) -> None:
        given = {"prefill": prefill, "position": position, "correction": correction, "cache": cache}
        for slot, method in given.items():
            object.__setattr__(self, slot, _press(method) if slot == "cache" else _resolve(slot, method))
        for rule, broken in _RULES.items():
            if broken(self):
                raise PolicyError(f"{self} breaks a rule of composition: {rule}")

    def to_dict(self) -> dict[str, Any]:
        """The policy as plain values for JSON; `from_dict` reads it back."""
        methods = {slot: getattr(self, slot) for slot in _SLOTS}
        return {
            "schema": SCHEMA,
            **{slot: None if m is None else {"name": m.name, **dataclasses.asdict(m)} for slot, m in methods.items()},
            "cache": None if self.cache is None else self.cache.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            OptionError: another schema, a kind, name or option that does not exist, or an option outside its range.
        """
        if values.get("schema") != SCHEMA:
            raise OptionError(f"schema={values.get('schema')!r} is not a policy of this version; expected {SCHEMA!r}")
        unknown = sorted(set(values) - {"schema", "cache", *_SLOTS})
        if unknown:
            raise OptionError(f"a policy has no {unknown[0]!r}; it has {', '.join(_SLOTS)}, cache")
        methods = {slot: _read(slot, values[slot]) for slot in _SLOTS if values.get(slot) is not None}
        if values.get("cache") is not None:
            methods["cache"] = kv.pressing.read(values["cache"])
        return cls(**methods)


_RULES: dict[str, Callable[[Policy], bool]] = {
    "a correction repairs a sparse prefill, and this one is dense": (
        lambda policy: policy.correction is not None and not policy.prefill.sparse
    ),
    "one method drops keys, not the prefill and the cache method both": (
        lambda policy: policy.cache is not None and policy.cache.drops_keys and policy.prefill.drops_keys
    ),
}


def available() -> tuple[str, ...]:
    """The names that `apply(model, name)` takes."""
    return tuple(_by_name())


def named(name: str) -> Policy:
    """The policy that `apply(model, name)` means: this method with its defaults, everything else dense and unchanged.

    Raises:
        OptionError: no such method; the message lists the names.
    """
    return _named(name)


def _named(name: str) -> Policy:
    composed = ":" in name or "+" in name  # of cache methods
    return Policy(cache=name) if composed else _by_name()[name]()


def _by_name() -> Registry[Callable[[], Policy]]:
    names: Registry[Callable[[], Policy]] = Registry("policy")
    for slot in ("prefill", "position"):  # a correction needs something to correct
        for name in _SLOTS[slot]:
            names.register(name, partial(Policy, **{slot: name}))
    for name in kv.methods(ready=True):
        names.register(name, partial(Policy, cache=name))
    return names


def _press(method: Any) -> Any:
    if isinstance(method, str):
        return kv.press(method)
    if method is None or isinstance(method, (kv.Press, kv.Chain)):
        return method
    raise PolicyError(f"cache={method!r} is not a press; make one with attnkit.kv.press(name, ratio=...)")


def _resolve(slot: str, method: Any) -> Any:
    if method is None and slot != "prefill":
        return None
    if isinstance(method, str):
        return _SLOTS[slot][method]()
    name = getattr(method, "name", None)
    if name not in _SLOTS[slot] or not isinstance(method, cast("type", _SLOTS[slot][cast("str", name)])):
        known = ", ".join(_SLOTS[slot]) or "none"
        raise PolicyError(f"{slot}={method!r} is not a registered {_SLOTS[slot].kind}; known: {known}")
    return method


def _read(slot: str, value: Mapping[str, Any]) -> Any:
    options = dict(value)
    factory = _SLOTS[slot][options.pop("name", "")]
    fields = [field.name for field in dataclasses.fields(cast("Any", factory))]
    for option in options:
        if option not in fields:
            raise OptionError(f"{slot} {value['name']!r} has no option {option!r}; it has {', '.join(fields) or 'none'}")
    return cast("Any", factory)(**options)
