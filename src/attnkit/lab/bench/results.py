"""The result file of a race, which is also its memory: written after every shape, read to go on."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnkit import report
from attnkit._core.errors import OptionError
from attnkit.lab.bench.heat import Outcome
from attnkit.lab.bench.race import Shape

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
        if resume and out is None:
            raise OptionError("resume=True needs out, the folder of the race to continue")
        self._path = None if out is None else out / f"{rules.op}.json"
        self._rules, self._command = rules, command
        self._began, self._spent = time.perf_counter(), 0.0
        self._rows: list[dict[str, Any]] = []
        self._skipped: list[dict[str, Any]] = []
        self.finished: list[str] = []
        self.copy_gb_s: float | None = None
        if self._path is None or not self._path.exists():
            return
        stored = report.read_envelope(self._path)
        if resume:
            self._require_same(self._path, stored)
            self._rows, self._skipped, self.finished = stored["rows"], stored["skipped"], stored["finished"]
            self.copy_gb_s, self._spent = stored["copy_gb_s"], stored["wall_s"]
        elif not stored.get("complete", True):
            raise OptionError(
                f"{self._path} is an unfinished race; continue it with resume (--resume), choose another out (--out), or "
                "delete it"
            )

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

    def _require_same(self, path: Path, stored: Mapping[str, Any]) -> None:
        for name, now in dataclasses.asdict(self._rules).items():
            before = stored.get(name)
            if before != now:
                raise OptionError(
                    f"cannot resume {path}: it was started with {name}={before}, this call has {now}; repeat the first call, "
                    "or choose another out"
                )
