"""The result file of a race, which is also its memory: written after every shape, read to go on."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from attnkit import report
from attnkit.lab.bench.heat import Outcome
from attnkit.lab.bench.race import Shape
from attnkit.report.resuming import earlier, require_same

__all__ = ["SCHEMA", "Results", "Rules"]

SCHEMA = "attnkit.race/1"


@dataclasses.dataclass(frozen=True)
class Rules:
    """What all rows of one file have in common; a resumed race must find it unchanged.

    Attributes:
        op, backend, peers, rounds, seed: as asked for.
        device, dtype, threads: where and in what it ran.
        commit: of attnkit.
        versions: package -> version.
    """

    op: str
    backend: str
    peers: list[str]
    rounds: int
    seed: int
    device: str
    dtype: str
    threads: int
    commit: str | None
    versions: dict[str, str | None]


class Results:
    """Rows so far, in `out/<op>.json` where there is a folder.

    Args:
        out: the folder; None keeps rows in memory only.
        rules: of the race.
        command: the command line to record.
        resume: go on with what the folder holds.
    Raises:
        OptionError: the file is an unfinished race and `resume` is not set, or was run under other rules and is; or `resume`
            is set and there is no folder.
        InputError: the file is damaged.

    Attributes:
        copy_gb_s: copy rate of the device; None until somebody has measured it.
        finished: the shapes that need not be raced again, as text.
    """

    def __init__(self, out: Path | None, rules: Rules, command: str, *, resume: bool) -> None:
        self._path = None if out is None else out / f"{rules.op}.json"
        self._rules, self._command = rules, command
        self._began, self._spent = time.perf_counter(), 0.0
        self._rows: list[dict[str, Any]] = []
        self._skipped: list[dict[str, Any]] = []
        self.finished: list[str] = []
        self.copy_gb_s: float | None = None
        stored = earlier(self._path, "race", resume=resume)
        if stored is not None and self._path is not None:
            require_same(self._path, stored, dataclasses.asdict(rules))
            self._rows, self._skipped, self.finished = stored["rows"], stored["skipped"], stored["finished"]
            self.copy_gb_s, self._spent = stored["copy_gb_s"], stored["wall_s"]

    def add(self, shape: Shape, outcome: Outcome) -> None:
        """Record one shape."""
        self._rows += outcome.rows
        self._skipped += outcome.skipped
        self.finished.append(str(shape))
        self.save(complete=False)

    def save(self, *, complete: bool) -> dict[str, Any]:
        """Put everything on disk, whole or not at all, and return it."""
        rules = self._rules
        document = report.envelope(
            SCHEMA,
            self._rows,
            command=self._command,
            seed=rules.seed,
            device=rules.device,
            dtype=rules.dtype,
            wall_s=self._spent + time.perf_counter() - self._began,
            extra={
                **{name: getattr(rules, name) for name in ("op", "commit", "backend", "peers", "rounds", "threads")},
                "copy_gb_s": self.copy_gb_s,
                "skipped": self._skipped,
                "finished": self.finished,
                "complete": complete,
            },
        )
        document["versions"] = rules.versions
        if self._path is not None:
            report.write_json(self._path, document)
        return document
