"""The entry: arguments are checked, shapes are raced, files are written."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from attnkit import ops, report
from attnkit._core.devices import device_name
from attnkit._core.errors import BackendUnavailable, OptionError
from attnkit._core.events import Event, Kind
from attnkit.lab.bench import machine
from attnkit.lab.bench.heat import Course
from attnkit.lab.bench.race import Peer, Race, Shape, contestants
from attnkit.lab.bench.races import RACES
from attnkit.lab.bench.results import Results, Rules

__all__ = ["run"]

MIN_ROUNDS = 3  # below that a median and quartiles say nothing


def run(
    op: str,
    *,
    peers: Sequence[str | Peer] | None = None,
    lengths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    passes: Sequence[str] | None = None,
    heads: tuple[int, int] | None = None,
    batch: int | None = None,
    vary: Mapping[str, Sequence[int | str]] | None = None,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    rounds: int = 9,
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Race an operator against its peers; the package's docstring has the protocol.

    Args:
        op: a name in RACES.
        peers: names of the race's peers, "attnkit:BACKEND", or peers of your own; None means all that are made for the
            device.
        lengths: tokens; None means the race's own for the device.
        dims: head widths D; None means the race's own.
        passes: "fwd", "fwd+bwd", "decode", "step", as far as the race has them; None means all.
        heads: (H, Hkv); None means the race's own.
        batch: B; None means the race's own for the device.
        vary: name -> values of what else the race can vary (docs/race.md), one shape for each combination.
        backend: of ours; "auto" takes whatever the operator would choose.
        device: where to compute.
        dtype: of the inputs, by default bfloat16 on CUDA and float32 elsewhere.
        rounds: measurements of each contestant, at least 3.
        seed: of the inputs.
        out: folder for <op>.json and <op>.html; None writes nothing.
        resume: keep the shapes that the file in `out` holds.
        on_event: called as the work goes on.
        command: the command line to record; None records this call.
    Returns:
        the envelope of attnkit.race/1, as in the file. Times are in milliseconds, memory in MiB, rates in 1e12 operations
        and 1e9 bytes a second.
    Raises:
        OptionError: an unknown operator, peer, pass, backend or name in `vary`, or a value outside its range.
        InputError: the operator does not take such shapes.
        BackendUnavailable: the backend of ours cannot run them; the message has its reasons.
    """
    race, place = RACES[op], torch.device(device)
    number = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    chosen = contestants(race, peers, place)
    lengths, dims = lengths or race.lengths[place.type], dims or race.dims
    if min(*lengths, *dims, 1 if batch is None else batch) < 1 or rounds < MIN_ROUNDS:
        raise OptionError(f"lengths, dims and batch must be at least 1 and rounds at least {MIN_ROUNDS}")
    if not race.dims and (dims or heads):
        raise OptionError(f"{op} has no heads; leave dims and heads out")
    shapes = [
        Shape(step, race.sizes(step, length, width, heads or race.heads, each), number, place, variant)
        for step, width, variant, length in itertools.product(
            race.choose_passes(passes), dims or (1,), race.choose_variants(vary), sorted(set(lengths))
        )
        for each in [race.sequences(place.type, length) if batch is None else batch]
    ]
    with machine.cold_kernels() as cold, torch.cuda.device(place) if place.type == "cuda" else nullcontext():
        _check(race, shapes, backend)
        rules = Rules(
            op=op,
            backend=backend,
            peers=[peer.name for peer in chosen],
            rounds=rounds,
            seed=seed,
            device=device_name(place),
            dtype=str(number).removeprefix("torch."),
            threads=torch.get_num_threads(),
            commit=machine.commit(),
            versions=_versions(chosen),
        )
        call = f"attnkit.lab.bench.run({op!r}, peers={rules.peers!r}, lengths={list(lengths)!r}, dims={list(dims)!r})"
        results = Results(out, rules, command or call, resume=resume)
        todo = [shape for shape in shapes if str(shape) not in results.finished]
        tell = _Teller(on_event, len(shapes), len(shapes) - len(todo))
        if results.copy_gb_s is None:
            tell("phase", "measuring how fast memory is copied")
            results.copy_gb_s = machine.copy_gb_s(place)
        course = Course(race, backend, chosen, rounds=rounds, seed=seed, cold=cold, copy_gb_s=results.copy_gb_s)
        tell("plan", f"{len(shapes)} shapes, {len(chosen)} peers")
        for shape in todo:
            results.add(shape, course.run(shape))
            tell("step", str(shape))
            if place.type == "cuda":
                torch.cuda.empty_cache()  # the next shape starts without the holes that this one left
    document = results.save(complete=True)
    if out is not None:
        report.write_html(out / f"{op}.html", [document])
    return document


class _Teller:
    """Counts shapes and tells who listens."""

    def __init__(self, listener: Callable[[Event], None] | None, total: int, done: int) -> None:
        self._listener, self._total, self._done = listener, total, done

    def __call__(self, kind: Kind, text: str) -> None:
        self._done += kind == "step"
        if self._listener is not None:
            self._listener(Event(kind, text, self._done, self._total))


def _check(race: Race, shapes: Sequence[Shape], backend: str) -> None:
    """Refuse what ours cannot do before anything is timed: bad sizes and backends, on small inputs of the same kind."""
    small = {str(reduced): reduced for reduced in map(race.smaller, shapes)}
    for shape in small.values():
        explanation = ops.explain(race.op, backend=backend, **race.arguments(race.draw(shape, seed=0)))
        if explanation.chosen is None:
            reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in explanation.rejected.items())
            raise BackendUnavailable(f"{race.op} cannot run {shape}. {reasons}")


def _versions(peers: Sequence[Peer]) -> dict[str, str | None]:
    return report.versions() | {peer.package: machine.package_version(peer.package) for peer in peers if peer.package}
