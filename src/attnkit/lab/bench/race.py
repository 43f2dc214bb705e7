"""What an operator brings to a race: shapes, inputs, the work they are, and peers. Everything else is shared."""

import dataclasses
import difflib
import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from attnkit._core.checks import accumulator_dtype
from attnkit._core.errors import OptionError
from attnkit._core.registry import Registry
from attnkit.ops import OPS
from attnkit.report.race import OWN

__all__ = ["BACKWARD", "MEMORY_BOUND", "OWN", "Axis", "Facts", "Operator", "Peer", "Race", "Shape", "Sizes", "contestants"]

Operator = Callable[..., Any]  # takes the operator's keyword arguments, returns what the operator returns
Sizes = Mapping[str, int]
Value = int | str

BACKWARD = "fwd+bwd"
MEMORY_BOUND = ("decode", "step")  # passes that read much and compute little


@dataclass(frozen=True)
class Shape:
    """One point of a race.

    Attributes:
        step: the pass: "fwd", "fwd+bwd", "decode" or "step".
        sizes: letter -> size, as rows show them; S (keys) where it differs from T, else T is the length.
        dtype, device: of the inputs.
        variant: what else tells inputs apart, a value for each axis of the race; rows show it beside the sizes.
    """

    step: str
    sizes: Sizes
    dtype: torch.dtype
    device: torch.device
    variant: Mapping[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.step}, {' '.join(f'{name}={value}' for name, value in self.place.items())}"

    @property
    def place(self) -> dict[str, Value]:
        """Sizes and variant."""
        return {**self.sizes, **self.variant}

    @property
    def trains(self) -> bool:
        """Whether the pass has a backward part."""
        return self.step == BACKWARD


def _none(shape: Shape) -> list[str]:
    return []


@dataclass(frozen=True)
class Peer:
    """Somebody else's implementation.

    Attributes:
        name: what `peers=` calls it.
        summary: what it is.
        make: shape -> the implementation, which takes the operator's keyword arguments and returns what the operator
            returns. What a user would do once and keep (masks, compiling) is done here and not timed.
        limits: shape -> reasons why it cannot do it; none means it is worth a try.
        devices: kinds of devices that it is for; it runs by default on these.
        module: what must be importable.
        install: how to get it, in the sentence "... is not installed; ...".
        package: distribution whose version belongs into the result; empty where torch's says it.
        same_result: whether it computes what the operator computes. One that does not is a baseline: it is timed and its
            memory measured, nobody judges its numbers, and rows call it by its label.
        plain: why its calls are not captured where those of others are replayed from a CUDA graph; empty where they are.
    """

    name: str
    summary: str
    make: Callable[[Shape], Operator]
    limits: Callable[[Shape], list[str]] = _none
    devices: tuple[str, ...] = ("cuda",)
    module: str = "torch"
    install: str = ""
    package: str = ""
    same_result: bool = True
    plain: str = ""

    @property
    def label(self) -> str:
        """What rows and plots call it: a baseline's name ends in a star."""
        return self.name if self.same_result else f"{self.name}*"

    def reasons(self, shape: Shape) -> list[str]:
        """Why it cannot take part on this shape."""
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            return [f"{error.name} is not installed; {self.install}"]
        except ImportError as error:
            return [f"{self.module} cannot be imported: {error}"]
        elsewhere = shape.device.type not in self.devices
        return [f"runs on {' and '.join(self.devices)} only"] if elsewhere else self.limits(shape)


@dataclass(frozen=True)
class Axis:
    """Something other than a size that a race can be asked to vary.

    Attributes:
        summary: what it is.
        defaults: its values unless others are asked for.
        parse: text -> value; a ValueError says what is allowed.
    """

    summary: str
    defaults: tuple[Value, ...]
    parse: Callable[[str], Value]


Facts = Mapping[str, float]  # what was measured of the inputs of a shape


@dataclass(frozen=True)
class Race:
    """How an operator is raced.

    Attributes:
        op: its name in `attnkit.ops`.
        peers: whom it meets.
        passes: what can be timed, in the order of the rows.
        lengths: kind of device -> tokens, by default.
        dims: head widths, by default; none where the operator has no heads.
        heads: (H, Hkv), by default.
        sizes: (pass, length, head width, heads, batch) -> sizes of the shape.
        inputs: (shape, generator) -> the operator's keyword arguments on the generator's device, float tensors in float32 or
            in the shape's dtype.
        reduced: sizes -> small sizes of the same kind, for conformance.
        grads: inputs that get gradients in "fwd+bwd".
        flops: shape -> multiplications and additions; None where the operator does little else than read and write.
        traffic: shape -> bytes that must be read or written, of passes that are bound by memory and of races without flops.
        axes: what else can be varied.
        batch: kind of device -> sequences, by default 1.
        tokens: kind of device -> tokens of all sequences together, by default: batches shrink as lengths grow.
        fixed: inputs that stay in the accumulation dtype.
        facts: (shape, inputs) -> what is worth knowing about them; measured after our first call, once for all passes.
        replayed: whether calls of all passes are replayed from a CUDA graph, not only of those that are bound by memory.
    """

    op: str
    peers: Registry[Peer]
    passes: tuple[str, ...]
    lengths: Mapping[str, tuple[int, ...]]
    dims: tuple[int, ...]
    heads: tuple[int, int]
    sizes: Callable[[str, int, int, tuple[int, int], int], Sizes]
    inputs: Callable[[Shape, torch.Generator], dict[str, Any]]
    reduced: Callable[[Sizes], Sizes]
    grads: tuple[str, ...]
    flops: Callable[[Shape], float] | None
    traffic: Callable[[Shape], float]
    axes: Mapping[str, Axis] = field(default_factory=dict)
    batch: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    facts: Callable[[Shape, dict[str, Any]], Facts] | None = None
    replayed: bool = False

    def draw(self, shape: Shape, seed: int) -> dict[str, Any]:
        """Inputs of a shape, in its dtype on its device."""
        inputs = self.inputs(shape, torch.Generator(shape.device).manual_seed(seed))
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                dtype = accumulator_dtype(shape.dtype) if name in self.fixed else shape.dtype
                inputs[name] = value.to(dtype).requires_grad_(shape.trains and name in self.grads)
        return inputs

    def arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the operator, and a peer in its place, is called with."""
        return OPS[self.op].arguments(inputs)

    def sequences(self, device: str, length: int) -> int:
        """The batch by default, on a kind of device."""
        tokens = self.tokens.get(device)
        return self.batch.get(device, 1) if tokens is None else max(tokens // length, 1)

    def smaller(self, shape: Shape) -> Shape:
        """The reduced shape of the same kind."""
        return dataclasses.replace(shape, sizes=self.reduced(shape.sizes))

    def own(self, backend: str) -> Operator:
        """Our operator with a backend."""
        return partial(OPS[self.op].function, backend=backend)

    def choose_passes(self, names: Sequence[str] | None) -> tuple[str, ...]:
        """Passes by name, all by default, in the order of the race.

        Raises:
            OptionError: the race has no such pass.
        """
        for name in names or ():
            if name not in self.passes:
                near = difflib.get_close_matches(name, self.passes, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise OptionError(f"unknown pass {name!r} of {self.op}; {hint}known: {', '.join(self.passes)}")
        return tuple(name for name in self.passes if names is None or name in names)

    def choose_variants(self, vary: Mapping[str, Sequence[Value]] | None) -> list[dict[str, Value]]:
        """Every combination of the values of the axes, the given ones and else their defaults.

        Raises:
            OptionError: the race has no such axis, or the axis no such value.
        """
        for name in vary or ():
            if name not in self.axes:
                known = ", ".join(self.axes) or "none"
                raise OptionError(f"{self.op} has nothing called {name!r} to vary; known: {known}")
        chosen = [
            [self._parse(name, value) for value in (vary or {}).get(name, axis.defaults)] for name, axis in self.axes.items()
        ]
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*map(dict.fromkeys, chosen))]

    def _parse(self, name: str, value: Value) -> Value:
        try:
            return self.axes[name].parse(str(value))
        except ValueError as error:
            raise OptionError(f"{name}={value} of {self.op}: {error}") from error


def contestants(race: Race, chosen: Sequence[str | Peer] | None, device: torch.device) -> tuple[Peer, ...]:
    """Peers by name; by default all that are made for the device.

    Args:
        chosen: names of the registry, "attnkit:BACKEND" or "attnkit:BACKEND:OPTION=VALUE" for the operator itself with
            another backend and options ("attnkit:triton:stable=delta"), or peers as they are.
    Raises:
        OptionError: an unknown peer, backend or option.
    """
    if chosen is None:
        return tuple(peer for peer in race.peers.values() if device.type in peer.devices)
    return tuple(peer if isinstance(peer, Peer) else _named(race, peer) for peer in dict.fromkeys(chosen))


def _named(race: Race, name: str) -> Peer:
    if not name.startswith(f"{OWN}:"):
        return race.peers[name]
    backend, *given = name.removeprefix(f"{OWN}:").split(":")
    known = [other.name for other in OPS[race.op].backends]
    if backend not in known:
        raise OptionError(f"{race.op} has no backend {backend!r}; choose one of {', '.join(known)}")
    options = dict(_option(race.op, text) for text in given)
    summary = f"the {backend} backend of the operator"
    return Peer(name, summary, lambda shape: partial(race.own(backend), **options), devices=("cpu", "cuda"))


def _option(op: str, text: str) -> tuple[str, Any]:
    """OPTION=VALUE of an operator; a value that names a dtype is one."""
    name, _, value = text.partition("=")
    if name not in inspect.signature(OPS[op].function).parameters:
        raise OptionError(f"{op} has no option {name!r}; write attnkit:BACKEND:OPTION=VALUE, for example stable=delta")
    found = getattr(torch, value, None)
    return name, found if isinstance(found, torch.dtype) else value
