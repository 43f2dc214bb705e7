"""Deviation over formats, lengths, tiles, algorithms, inputs and seeds, in a file that remembers what is done."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from attnkit import report
from attnkit._core.checks import check_choice
from attnkit._core.devices import device_name
from attnkit._core.errors import OptionError
from attnkit._core.events import Event
from attnkit.lab.numerics.emulate import Normalizer, emulated_attention
from attnkit.lab.numerics.formats import parse_format, round_to
from attnkit.lab.numerics.golden import golden_attention
from attnkit.lab.numerics.inputs import DISTRIBUTIONS
from attnkit.lab.numerics.metrics import deviation
from attnkit.lab.numerics.policy import PRESETS, Preset, SitePolicy
from attnkit.lab.numerics.recurrences import ALGORITHMS, Algorithm
from attnkit.report.resuming import earlier, require_same

__all__ = ["SCHEMA", "DeviationSweep"]

SCHEMA = "attnkit.deviation/1"
_FILE = "sweep"


@dataclass(frozen=True)
class _Cell:
    """One set of inputs."""

    format: str
    distribution: str
    length: int
    seed: int

    def __str__(self) -> str:
        return f"{self.format}, {self.distribution}, {self.length:,} tokens, seed {self.seed}"


@dataclass(frozen=True)
class DeviationSweep:
    """What is measured: every combination of the tuples. The baseline is measured on each set of inputs beside them.

    Attributes:
        formats: as `parse_format` takes them. Inputs are rounded to the format first, which is not counted as error.
        lengths: tokens.
        blocks: keys of a tile.
        algorithms: tiled ones, as of `emulated_attention`.
        policies: presets of `SitePolicy`.
        distributions: names in DISTRIBUTIONS.
        normalizers: as of `emulated_attention`.
        seeds: of the inputs.
        width: D.
        causal: whether a row sees the keys up to its own only.
    Raises:
        OptionError: an unknown name, nothing to measure, or a number below 1.
    """

    formats: tuple[str, ...] = ("bf16", "fp16")
    lengths: tuple[int, ...] = (256, 1024)
    blocks: tuple[int, ...] = (16, 64)
    algorithms: tuple[Algorithm, ...] = ("fa2",)
    policies: tuple[Preset, ...] = ("paper", "kernel")
    distributions: tuple[str, ...] = ("normal",)
    normalizers: tuple[Normalizer, ...] = ("exact",)
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 64
    causal: bool = False

    def __post_init__(self) -> None:
        for name, values in dataclasses.asdict(self).items():
            if values == ():
                raise OptionError(f"{name} is empty; give at least one")
        if min(*self.lengths, *self.blocks, self.width) < 1:
            raise OptionError("lengths, blocks and width must be at least 1")
        for name, values, allowed in (
            ("algorithms", self.algorithms, ALGORITHMS[1:]),
            ("policies", self.policies, PRESETS),
            ("normalizers", self.normalizers, get_args(Normalizer)),
        ):
            for value in values:
                check_choice(name, value, allowed)
        for fmt, distribution in itertools.product(self.formats, self.distributions):
            parse_format(fmt)
            DISTRIBUTIONS[distribution]

    def run(
        self,
        out: Path | None = None,
        *,
        device: str | torch.device = "cpu",
        resume: bool = False,
        on_event: Callable[[Event], None] | None = None,
        command: str | None = None,
    ) -> dict[str, Any]:
        """Measure everything.

        Args:
            out: folder for sweep.json and sweep.html; None writes nothing.
            device: where to compute; inputs are drawn on the CPU, so that every device sees the same ones.
            resume: keep the inputs that the file in `out` is done with.
            on_event: called as the work goes on.
            command: the command line to record; None records this call.
        Returns:
            the envelope of attnkit.deviation/1, as in the file: a row for each (inputs, algorithm, policy, normaliser,
            tile) with the fields of `Deviation`, and `ratio_max` and `ratio_rms`, max_abs and rms in terms of the
            baseline's.
        Raises:
            OptionError: the file is an unfinished sweep and `resume` is not set, or is another sweep and it is.
            UnsupportedError: what `emulated_attention` refuses.
        """
        place = torch.device(device)
        memory = _Memory(out, self, device_name(place), command or f"attnkit.lab.numerics.{self!r}.run()", resume=resume)
        cells = [_Cell(*values) for values in itertools.product(self.formats, self.distributions, self.lengths, self.seeds)]
        todo = [cell for cell in cells if str(cell) not in memory.finished]
        done = len(cells) - len(todo)
        tell = on_event or (lambda event: None)
        tell(Event("plan", f"{len(cells)} sets of inputs", done, len(cells)))
        for count, cell in enumerate(todo, done + 1):
            memory.add(cell, list(self._measure(cell, place)))
            tell(Event("step", str(cell), count, len(cells)))
        document = memory.save(complete=True)
        if out is not None:
            report.write_html(out / f"{_FILE}.html", [document])
        return document

    def _measure(self, cell: _Cell, device: torch.device) -> Iterator[dict[str, Any]]:
        fmt = parse_format(cell.format)
        generator = torch.Generator().manual_seed(cell.seed)
        drawn = DISTRIBUTIONS[cell.distribution].draw(generator, cell.length, 1, self.width)
        q, k, v = (round_to(t.double(), fmt).to(device) for t in drawn)
        golden = golden_attention(q, k, v, causal=self.causal)
        scale = golden_attention(q, k, v.abs(), causal=self.causal)
        stored = emulated_attention(q, k, v, policy=SitePolicy.preset("paper", fmt), causal=self.causal)
        base = deviation(stored, golden, fmt, scale)

        def row(out: torch.Tensor, algorithm: str, policy: str, normalizer: str, block: int | None) -> dict[str, Any]:
            found = deviation(out, golden, fmt, scale)
            ratios = {f"ratio_{short}": _ratio(getattr(found, name), getattr(base, name)) for short, name in _RATIOS.items()}
            what = {"algorithm": algorithm, "policy": policy, "normalizer": normalizer, "block": block, "p": fmt.p}
            return dataclasses.asdict(cell) | what | dataclasses.asdict(found) | ratios

        yield row(stored, "baseline", "baseline", "exact", None)
        for algorithm, policy, normalizer, block in itertools.product(
            self.algorithms, self.policies, self.normalizers, self.blocks
        ):
            result = emulated_attention(
                q, k, v, policy=SitePolicy.preset(policy, fmt), algorithm=algorithm, block_q=block, block_k=block,
                causal=self.causal, normalizer=normalizer,
            )  # fmt: skip
            yield row(result, algorithm, policy, normalizer, block)


_RATIOS = {"max": "max_abs", "rms": "rms"}
_RULES = ("blocks", "algorithms", "policies", "normalizers", "width", "causal")  # what all rows of a file have in common


class _Memory:
    """The result file, written after every set of inputs and read to go on."""

    def __init__(self, out: Path | None, sweep: DeviationSweep, device: str, command: str, *, resume: bool) -> None:
        self._path = None if out is None else out / f"{_FILE}.json"
        self._sweep, self._device, self._command = sweep, device, command
        self._began, self._spent = time.perf_counter(), 0.0
        self._rows: list[dict[str, Any]] = []
        self.finished: list[str] = []
        stored = earlier(self._path, "sweep", resume=resume)
        if stored is not None and self._path is not None:
            now = self._rules() | {"schema": SCHEMA, "device": device, "versions": report.versions()}
            require_same(self._path, stored, report.plain(now))
            self._rows, self.finished, self._spent = stored["rows"], stored["finished"], stored["wall_s"]

    def add(self, cell: _Cell, rows: list[dict[str, Any]]) -> None:
        """Record one set of inputs."""
        self._rows += rows
        self.finished.append(str(cell))
        self.save(complete=False)

    def save(self, *, complete: bool) -> dict[str, Any]:
        """Put everything on disk, whole or not at all, and return it."""
        document = report.envelope(
            SCHEMA,
            self._rows,
            command=self._command,
            seed=None,
            device=self._device,
            dtype=", ".join(self._sweep.formats),
            wall_s=self._spent + time.perf_counter() - self._began,
            extra=self._rules() | {"finished": self.finished, "complete": complete},
        )
        if self._path is not None:
            report.write_json(self._path, document)
        return document

    def _rules(self) -> dict[str, Any]:
        return {name: getattr(self._sweep, name) for name in _RULES}


def _ratio(value: float, base: float) -> float | None:
    return value / base if base else None
