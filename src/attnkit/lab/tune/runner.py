"""The entry: which kernels are tuned, by whom, and where the result is kept."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from attnkit import report
from attnkit._core.devices import device_name
from attnkit._core.errors import DeviceUnavailable, DTypeError, OptionError
from attnkit._core.events import Event, Kind
from attnkit._core.triton import interpreted
from attnkit.lab.pool import Lost, Pool, workers_for
from attnkit.lab.tune.search import Dropped, Row, choose, faithful, race
from attnkit.lab.tune.trial import Problem, Trial, attempt, dtype_name, probe
from attnkit.lab.tune.tunables import TUNABLES, Tunable

__all__ = ["run"]

MIN_ROUNDS = 3  # below that a median and quartiles say nothing
_LIMIT_S = 180.0  # to compile and run one configuration; those worth having take a few seconds
_HOPPER_SHARED = 227 * 1024


def run(
    op: str = "attention",
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    dims: Sequence[int] | None = None,
    kernels: Sequence[str] | None = None,
    device: str | torch.device = "cuda",
    workers: int | None = None,
    rounds: int = 9,
    store: bool = True,
    on_event: Callable[[Event], None] | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure the tile sizes of an operator's kernels and keep the best; the package's docstring has the protocol.

    Each result is kept when it is known, so that an interrupted run loses only the kernel it was at.

    Args:
        op: a name in TUNABLES.
        dtypes: of the inputs, by default bfloat16 on CUDA. bfloat16 and float16 share their entries: name one of them.
        dims: padded head widths, powers of two; None means all that the kernels have.
        kernels: by name; None means all.
        device: a GPU. The CPU is taken where Triton's interpreter runs; its times say nothing.
        workers: processes that compile; None goes by cores and free memory, 0 compiles in this process.
        rounds: measurements of each finalist, at least 3.
        store: write winners to the user's cache, and use them from now on.
        on_event: called as the work goes on.
        command: the command line to record; None records this call.
    Returns:
        an envelope of schema attnkit.tune/1 with a `Row` a kernel, dtype and width, and `path`, the file of the user's
        table; `wrote` says whether this run changed it. Times are in milliseconds.
    Raises:
        OptionError: an unknown operator, kernel or width, or a value outside its range.
        DTypeError: the device does not take the dtype.
        DeviceUnavailable: there is no such GPU.
        MissingExtra: Triton is not installed.
        BackendUnavailable: worker processes do not start.
        InputError: the user's table is damaged; the message has its path.
    """
    place = _place(device)
    tunable = TUNABLES[op]()
    problems = _problems(tunable, place, dtypes, kernels, dims)
    if rounds < MIN_ROUNDS or (workers is not None and workers < 0):
        raise OptionError(f"rounds={rounds}, workers={workers}: rounds must be at least {MIN_ROUNDS}, workers at least 0")
    begin, rows, wrote = time.monotonic(), [], False
    names = ", ".join(dict.fromkeys(dtype_name(problem.dtype) for problem in problems))
    with (
        torch.cuda.device(place) if place.type == "cuda" else nullcontext(),
        torch.no_grad(),
        Pool.open(attempt, workers_for(place) if workers is None else workers, _LIMIT_S) as pool,
    ):
        tell = _Teller(on_event, len(problems))
        tell("plan", f"{len(problems)} kernels")
        try:
            for problem in problems:
                row = _tune(tunable, problem, pool, rounds, tell)
                rows.append(row)
                if store and row.best != row.present:
                    tunable.table.store({problem.key: row.best}, place)
                    wrote = True
                change = f"{row.present} -> {row.best}" if row.best != row.present else str(row.best)
                tell("step", f"{problem}: {change}")
        finally:
            probe.cache_clear()  # the tensors of the last problem
    return report.envelope(
        "attnkit.tune/1",
        rows,
        command=command or f"attnkit.lab.tune.run({op!r}, dims={dims!r}, kernels={kernels!r})",
        seed=None,
        device=device_name(place),
        dtype=names,
        wall_s=time.monotonic() - begin,
        extra={"op": op, "path": tunable.table.path(place), "wrote": wrote},
    )


def _tune(tunable: Tunable, problem: Problem, pool: Pool, rounds: int, tell: "_Teller") -> Row:
    device = problem.device
    present = tunable.table.pick(*problem.key, device)
    configs = dict.fromkeys((present, *tunable.candidates(*problem.key, _shared_memory(device))))
    tell("phase", f"{problem}: {len(configs)} configurations")
    results = pool.run([Trial(problem, config) for config in configs])
    reasons = [result.reason if isinstance(result, Lost) else result for result in results]
    dropped = [Dropped(config, why) for config, why in zip(configs, reasons, strict=True) if why]
    alive = [config for config, why in zip(configs, reasons, strict=True) if not why]
    final, failed, notes = race(probe(problem), device, present, alive, rounds) if alive else ([], [], ())
    dropped += failed
    times = {timed.config: timed.ms for timed in final}
    best, gain, noise = present, 0.0 if present in times else None, None
    winners = choose(final, present)
    if winners:
        judged = [winner.config for winner in winners] + [present] * (present in times)
        try:
            verdicts = faithful(tunable, probe(problem), judged)
        except torch.OutOfMemoryError:
            verdicts = dict.fromkeys(judged, "no memory to compare its outputs with float64")
        dropped += [Dropped(config, why) for config, why in verdicts.items() if why and config != present]
        accepted = [winner for winner in winners if not verdicts[winner.config]]
        if accepted:
            best, gain, noise = accepted[0].config, accepted[0].gain, accepted[0].spread
    kernel, bits, width = problem.key
    return Row(
        kernel=kernel,
        dtype=dtype_name(problem.dtype),
        bits=bits,
        width=width,
        present=present,
        present_ms=times.get(present),
        best=best,
        best_ms=times.get(best),
        gain=gain,
        spread=noise,
        tried=len(configs),
        dropped=tuple(dropped),
        notes=notes,
    )


def _place(device: str | torch.device) -> torch.device:
    """The device with its index, since that is how tensors and tables name it."""
    place = torch.device(device)
    if place.type == "cpu" and interpreted():
        return place
    if place.type != "cuda" or not torch.cuda.is_available():
        raise DeviceUnavailable(f"device {place}: tuning measures kernels on a GPU, and there is none here")
    place = torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
    if torch.cuda.get_device_capability(place) < (8, 0):
        raise DeviceUnavailable(f"{torch.cuda.get_device_name(place)}: the kernels need compute capability 8.0")
    return place


def _problems(
    tunable: Tunable,
    place: torch.device,
    dtypes: Sequence[torch.dtype] | None,
    kernels: Sequence[str] | None,
    dims: Sequence[int] | None,
) -> list[Problem]:
    """Width by width, so that an interrupted run has finished all kernels of some widths."""
    numbers = dtypes or [torch.bfloat16 if place.type == "cuda" else torch.float32]
    if place.type == "cpu" and any(number.itemsize < 4 for number in numbers):
        raise DTypeError("Triton's interpreter computes 16 bits wrongly; take torch.float32 on the CPU")
    if len({number.itemsize for number in numbers}) < len(numbers):
        shown = ", ".join(map(dtype_name, numbers))
        raise OptionError(f"dtypes={shown}: dtypes of one size share their entries; name one of them")
    known = tunable.table.keys()
    for what, given, allowed in (
        ("kernel", kernels, list(dict.fromkeys(key[0] for key in known))),
        ("bits of the dtype", [number.itemsize * 8 for number in numbers], list(dict.fromkeys(key[1] for key in known))),
        ("padded head width", dims, list(dict.fromkeys(key[2] for key in known))),
    ):
        for value in given or ():
            if value not in allowed:
                raise OptionError(f"{what} {value!r} is not tuned; choose from {', '.join(map(str, allowed))}")
    problems = [
        Problem(tunable.op, kernel, number, width, place)
        for number in numbers
        for kernel, bits, width in known
        if bits == number.itemsize * 8 and (not kernels or kernel in kernels) and (not dims or width in dims)
    ]
    return sorted(problems, key=lambda problem: problem.width)


def _shared_memory(place: torch.device) -> int:
    """Bytes that a program may have; a Hopper GPU's where the device does not tell."""
    properties = torch.cuda.get_device_properties(place) if place.type == "cuda" else None
    return int(getattr(properties, "shared_memory_per_block_optin", _HOPPER_SHARED))


class _Teller:
    """Counts kernels and tells who listens."""

    def __init__(self, listener: Callable[[Event], None] | None, total: int) -> None:
        self._listener, self._total, self._done = listener, total, 0

    def __call__(self, kind: Kind, text: str) -> None:
        self._done += kind == "step"
        if self._listener is not None:
            self._listener(Event(kind, text, self._done, self._total))
