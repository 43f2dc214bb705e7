"""One shape of a race: who may start, the interleaved rounds, and the rows that come out."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.opspec import OPS, Case
from attnkit.lab.bench.inputs import normal
from attnkit.lab.bench.machine import copies_beyond_cache
from attnkit.lab.bench.race import MEMORY_BOUND, OWN, Facts, Operator, Peer, Race, Shape
from attnkit.lab.bench.timing import Calls, Entrant, interleave, reason
from attnkit.lab.compare.measure import clock
from attnkit.lab.numerics import conformance

__all__ = ["Course", "Outcome"]

Make = Callable[[Shape], Operator]
_MAX_COPIES = 64


class Refused(Exception):
    """A contestant does not start; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came out of one shape.

    Attributes:
        rows: one a peer that was raced.
        skipped: one a contestant that was not, with its reason; our own name means that nobody was.
    """

    rows: list[dict[str, Any]]
    skipped: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Own:
    """Our side of one shape: who runs, the backend that was chosen, the first call, the output's gradient for everybody."""

    entrant: Entrant
    backend: str
    first_call_s: float | None
    upstream: Tensor | None


class Course:
    """Races one shape after another under the same rules.

    Args:
        race: of the operator.
        backend: of ours.
        peers: whom ours meets.
        rounds: that count.
        seed: of the inputs.
        cold: whether our kernels are compiled in this process for the first time.
        copy_gb_s: what the device copies in a second, 1e9 bytes.
    """

    def __init__(
        self, race: Race, backend: str, peers: Sequence[Peer], *, rounds: int, seed: int, cold: bool, copy_gb_s: float
    ) -> None:
        self._race, self._backend, self._peers = race, backend, peers
        self._rounds, self._seed, self._cold, self._copy_gb_s = rounds, seed, cold, copy_gb_s
        self._verdicts: dict[tuple[str, str], str] = {}
        self._facts: dict[str, tuple[Facts, str]] = {}

    def run(self, shape: Shape) -> Outcome:
        """Race one shape. Whatever breaks on it, ours or a peer's, becomes a reason and does not end the race."""
        skipped: list[dict[str, Any]] = []

        @contextmanager
        def listed(name: str) -> Iterator[None]:
            try:
                yield
            except Exception as error:  # peers raise what they like
                why = str(error) if isinstance(error, Refused) else reason(error)
                skipped.append({"peer": name, **_place(shape), "reason": why})

        rows: list[dict[str, Any]] = []
        with torch.set_grad_enabled(shape.trains), listed(OWN):
            inputs = self._inputs(shape)
            own = self._own(shape, inputs)
            facts = self._known(shape, inputs[0])
            entrants = []
            for peer in self._peers:
                with listed(peer.name):
                    entrant, seconds = self._peer(peer, shape, inputs, own.upstream)
                    entrants.append((peer, entrant, seconds))
            if entrants:
                interleave([own.entrant, *(entrant for _, entrant, _ in entrants)], self._rounds)
                rows = [self._row(shape, own, *entry, *facts) for entry in entrants]
        return Outcome(rows, skipped)

    def _known(self, shape: Shape, inputs: dict[str, Any]) -> tuple[Facts, str]:
        """What the race measures of its inputs, or why it could not."""
        if self._race.facts is None:
            return {}, ""
        key = str(shape.place)
        if key not in self._facts:
            try:
                with torch.no_grad():
                    self._facts[key] = self._race.facts(shape, inputs), ""
            except Exception as error:  # a race is worth running without them
                self._facts[key] = {}, f"inputs not measured: {reason(error)}"
        return self._facts[key]

    def _inputs(self, shape: Shape) -> list[dict[str, Any]]:
        inputs = [self._race.draw(shape, self._seed)]
        if shape.step in MEMORY_BOUND:
            size = sum(value.nbytes for value in inputs[0].values() if isinstance(value, Tensor))
            copies = min(copies_beyond_cache(shape.device, size), _MAX_COPIES)
            inputs += [self._race.draw(shape, self._seed + copy) for copy in range(1, copies)]
        return inputs

    def _own(self, shape: Shape, inputs: list[dict[str, Any]]) -> Own:
        calls = self._calls(self._race.own(self._backend), shape, inputs, None)
        seconds = self._first(calls, shape)
        backend = ops.explain(self._race.op, backend=self._backend, **self._race.arguments(inputs[0])).chosen
        assert backend is not None  # it has just run
        # by name: for a small shape "auto" might choose another one
        self._judge(f"{OWN}:{backend}", lambda _: self._race.own(backend), shape)
        entrant = self._ready(OWN, shape, calls)
        return Own(entrant, backend, seconds if self._cold else None, calls.upstream)

    def _peer(self, peer: Peer, shape: Shape, inputs: list[dict[str, Any]], upstream: Tensor | None) -> tuple[Entrant, float]:
        """The contestant, warm, and the seconds of its first call, what it makes beforehand included."""
        reasons = peer.reasons(shape)
        if reasons:
            raise Refused("; ".join(reasons))
        known = self._verdicts.get(self._key(peer.name, shape))
        if known:
            raise Refused(known)
        begin = clock(shape.device)
        operator = peer.make(shape)
        made = clock(shape.device) - begin
        calls = self._calls(operator, shape, inputs, upstream)
        seconds = made + self._first(calls, shape)  # before it is judged, which would compile kernels for it
        if peer.same_result:
            self._judge(peer.name, peer.make, shape)
        return self._ready(peer.name, shape, calls, peer.plain), seconds

    def _first(self, calls: Calls, shape: Shape) -> float:
        """Seconds of a contestant's first call; whoever is first draws the gradient of the output for all."""
        begin = clock(shape.device)
        out = calls.forward(calls.inputs[0])
        seconds = clock(shape.device) - begin
        if calls.leaves:
            if calls.upstream is None:
                seed = self._seed + _MAX_COPIES  # no input is drawn from it: a gradient that is q is no gradient like others
                calls.upstream = normal(tuple(out.shape), torch.Generator(shape.device).manual_seed(seed), out.dtype)
            begin = clock(shape.device)
            torch.autograd.grad(out, calls.leaves, calls.upstream)
            seconds += clock(shape.device) - begin
        return seconds

    def _calls(self, operator: Operator, shape: Shape, inputs: list[dict[str, Any]], upstream: Tensor | None) -> Calls:
        leaves = [inputs[0][name] for name in self._race.grads] if shape.trains else []
        # what calls are given is made beforehand: a race of steps would time the making
        return Calls(operator, [self._race.arguments(each) for each in inputs], leaves, upstream)

    def _ready(self, name: str, shape: Shape, calls: Calls, plain: str = "") -> Entrant:
        graph = shape.device.type == "cuda" and (shape.step in MEMORY_BOUND or self._race.replayed)
        entrant = Entrant.ready(name, shape.device, calls, graph=graph and not plain)
        if graph and plain:
            entrant.note = f"{name}: plain calls, no CUDA graph ({plain})"
        return entrant

    def _judge(self, name: str, make: Make, shape: Shape) -> None:
        """Refuse who is outside the error budget on a reduced shape; one verdict serves all shapes that reduce to it."""
        key = self._key(name, shape)
        if key not in self._verdicts:
            self._verdicts[key] = self._verdict(make, self._race.smaller(shape))
        if self._verdicts[key]:
            raise Refused(self._verdicts[key])

    def _key(self, name: str, shape: Shape) -> tuple[str, str]:
        return name, str(self._race.smaller(shape))

    def _verdict(self, make: Make, shape: Shape) -> str:
        case = Case(
            f"race, {shape}", partial(self._race.inputs, shape), self._race.grads if shape.trains else (), self._race.fixed
        )
        try:
            rows = conformance.check(OPS[self._race.op], case, shape.dtype, device=shape.device, operator=make(shape))
        except Exception as error:  # peers raise what they like
            return reason(error)
        failed = "; ".join(_failure(row) for row in rows if not row.ok)
        return failed and f"fails conformance: {failed}"

    def _row(
        self, shape: Shape, own: Own, peer: Peer, entrant: Entrant, seconds: float, facts: Facts, why: str
    ) -> dict[str, Any]:
        ours = own.entrant
        ours_s, peer_s = statistics.median(ours.times), statistics.median(entrant.times)
        row = {
            "op": self._race.op,
            **_place(shape),
            "peer": peer.label,
            "ours_ms": 1e3 * ours_s,
            "peer_ms": 1e3 * peer_s,
            "ratio": peer_s / ours_s,
            "spread": spread([theirs / our for our, theirs in zip(ours.times, entrant.times, strict=True)]),
            "first_call_s": own.first_call_s,
            "peer_first_call_s": seconds,
            "same_result": peer.same_result,
            "backend": own.backend,
            "peak_mib": ours.peak_mib,
            "peer_peak_mib": entrant.peak_mib,
        }
        flops = None if shape.step in MEMORY_BOUND or self._race.flops is None else self._race.flops(shape)
        if flops is None:
            row["bandwidth_share"] = self._race.traffic(shape) / ours_s / 1e9 / self._copy_gb_s
        else:
            row["tflops"] = flops / ours_s / 1e12
            if peer.same_result:
                row["peer_tflops"] = flops / peer_s / 1e12
        if facts:
            row["facts"] = dict(facts)
        other = "" if peer.same_result else f"{peer.label} computes something else: {peer.summary}"
        notes = "; ".join(note for note in (ours.note, entrant.note, other, why) if note)
        return row | {"note": notes} if notes else row


def spread(values: Sequence[float]) -> float:
    """Interquartile range divided by the median, of at least three values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def _place(shape: Shape) -> dict[str, Any]:
    return {"shape": shape.place, "dtype": str(shape.dtype).removeprefix("torch."), "pass": shape.step}


def _failure(row: conformance.Row) -> str:
    return f"{row.quantity}: {row.note}" if row.note else f"{row.quantity} is off by {row.error:.1e}, allowed {row.budget:.1e}"
