"""The stopwatch: warm calls of one contestant, measured in lots that are long against the clock."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnkit.lab.compare.measure import PeakMemory

__all__ = ["Calls", "Entrant", "elapsed", "interleave", "reason"]

MEASURED_S = 0.05  # one measurement: a thousand times the jitter of a launch
_SETTLING = 5  # times that on a GPU: one at its power limit takes some 50 ms to leave the clock of whoever ran before
_WARM_S = 5.0  # of a GPU: so long the clock swings by some percent around what the power limit allows, after a pause
MAX_REPEATS = 1000
_LONGEST = 300  # characters of an error message; compilers write pages


def elapsed(device: torch.device, call: Callable[[], object], count: int) -> float:
    """Seconds for `count` calls one after another, divided by their number."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


@dataclass
class Calls:
    """An operator bound to inputs.

    Attributes:
        operator: takes the inputs by keyword.
        inputs: one set a call; several sets are called one after another.
        leaves: tensors whose gradients are asked for; none in forward passes.
        upstream: gradient of the output, for `leaves`.
    """

    operator: Callable[..., Any]
    inputs: Sequence[dict[str, Any]]
    leaves: Sequence[Tensor] = ()
    upstream: Tensor | None = None

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        """The first output."""
        result = self.operator(**inputs)
        out = result[0] if isinstance(result, tuple) else result
        assert isinstance(out, Tensor)
        return out

    def once(self) -> None:
        """The pass on the first set of inputs."""
        out = self.forward(self.inputs[0])
        if self.leaves:
            torch.autograd.grad(out, self.leaves, self.upstream)

    def all(self) -> None:
        """The pass on every set."""
        if self.leaves:
            self.once()
            return
        for inputs in self.inputs:
            self.forward(inputs)


@dataclass
class Entrant:
    """A contestant that is warm and ready.

    Attributes:
        name: of the contestant.
        device: where it runs.
        run: one lot of `lot` calls.
        repeats: lots in one measurement.
        peak_mib: largest memory of one call beyond what was there before.
        calls: what `run` runs; a captured graph reads tensors that nobody else may hold.
        note: what a reader must know about its times.
        times: seconds a call, one entry a round.
    """

    name: str
    device: torch.device
    run: Callable[[], object]
    lot: int
    repeats: int
    peak_mib: float | None
    calls: Calls
    note: str = ""
    times: list[float] = field(default_factory=list)

    @classmethod
    def ready(cls, name: str, device: torch.device, calls: Calls, *, graph: bool) -> "Entrant":
        """Warm a contestant up, and find out its memory and how many calls fill a measurement.

        Args:
            graph: replay its calls from a CUDA graph, on a GPU.
        """
        calls.once()
        gc.collect()  # garbage that falls away during the measurement would be counted as memory that was not needed
        with PeakMemory(device) as peak:  # of many calls, because on a CPU it is looked at from time to time
            elapsed(device, calls.once, _repeats(device, calls.once))
        run, note = _captured(device, calls) if graph and device.type == "cuda" else (calls.all, "")
        return cls(name, device, run, len(calls.inputs), _repeats(device, run), peak.mib, calls, note and f"{name}: {note}")

    def measure(self) -> float:
        """Seconds a call, of one measurement."""
        return elapsed(self.device, self.run, self.repeats) / self.lot


def _repeats(device: torch.device, run: Callable[[], object]) -> int:
    seconds = max(elapsed(device, run, 2), 1e-9)
    measured = MEASURED_S * (_SETTLING if device.type == "cuda" else 1)
    return min(max(math.ceil(measured / seconds), 1), MAX_REPEATS)


def interleave(entrants: Sequence[Entrant], rounds: int, *, rested: bool = True) -> None:
    """Measure everybody once a round; one more round comes first and does not count, on a GPU that has `rested` before as many
    as take five seconds.

    The order is a Williams square, read backwards every other round: over the rounds everybody comes first and last as often
    as the others, and after each of the others as often. In a cycle one contestant would always find the device as hot, and
    its clock as low, as its one neighbour has left it.
    """
    warm_s = _WARM_S if rested and entrants[0].device.type == "cuda" else 0.0
    begin = time.perf_counter()
    _round(entrants, 0)
    while time.perf_counter() - begin < warm_s:
        _round(entrants, 0)
    for turn in range(1, rounds + 1):
        for entrant, seconds in _round(entrants, turn):
            entrant.times.append(seconds)


def _round(entrants: Sequence[Entrant], turn: int) -> list[tuple[Entrant, float]]:
    found = []
    for place in _order(len(entrants), turn):
        entrant = entrants[place]
        try:
            found.append((entrant, entrant.measure()))
        except Exception as error:
            raise RuntimeError(f"{entrant.name} broke after its warm-up: {reason(error)}") from error
    return found


def _order(count: int, turn: int) -> list[int]:
    """0, count - 1, 1, count - 2 .., shifted by a step every two rounds."""
    zigzag = [i // 2 if i % 2 == 0 else count - 1 - i // 2 for i in range(count)]
    order = [(place + turn // 2) % count for place in zigzag]
    return order[::-1] if turn % 2 else order


def reason(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:_LONGEST]


def _captured(device: torch.device, calls: Calls) -> tuple[Callable[[], object], str]:
    """The calls as a CUDA graph, or as they are with the reason.

    A graph reads and writes where its tensors lay, but does not hold them: `calls` must live as long as it is replayed.
    """
    try:
        side = torch.cuda.Stream(device)  # first calls on a stream allocate, which must not be captured
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            calls.all()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls.all()
    except Exception as error:  # peers raise what they like
        return calls.all, f"plain calls, no CUDA graph ({reason(error)})"
    return graph.replay, ""
