"""A result file that is its own memory: written after every part of a measurement, and read to go on."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnkit import report
from attnkit.report.resuming import earlier, require_same

__all__ = ["Memory"]


class Memory:
    """The rows of a measurement, part by part.

    Args:
        path: of the file; None keeps nothing on disk.
        schema: of the file.
        what: of the file, for messages ("sweep").
        rules: what all rows have in common; entries of the envelope, and the same when a measurement goes on.
        command, device, dtype: see `report.envelope`.
        resume: go on with the file.

    Attributes:
        finished: parts that are done.
        rows: their rows.
    Raises:
        OptionError: the file is unfinished and `resume` is not set, or is of another measurement and it is.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        schema: str,
        what: str,
        rules: Mapping[str, Any],
        command: str,
        device: str,
        dtype: str,
        resume: bool,
    ) -> None:
        self._path, self._schema, self._rules = path, schema, dict(rules)
        self._command, self._device, self._dtype = command, device, dtype
        self._began, self._spent = time.perf_counter(), 0.0
        self.rows: list[dict[str, Any]] = []
        self.finished: list[str] = []
        stored = earlier(path, what, resume=resume)
        if stored is not None and path is not None:
            now = self._rules | {"schema": schema, "device": device, "versions": report.versions()}
            require_same(path, stored, report.plain(now))
            self.rows, self.finished, self._spent = stored["rows"], stored["finished"], stored["wall_s"]

    def add(self, part: str, rows: Sequence[dict[str, Any]]) -> None:
        """Record one part."""
        self.rows += rows
        self.finished.append(part)
        self.save(complete=False)

    def save(self, *, complete: bool, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Put everything on disk, whole or not at all, and return it; `extra` are further entries of the envelope."""
        document = report.envelope(
            self._schema,
            self.rows,
            command=self._command,
            seed=None,
            device=self._device,
            dtype=self._dtype,
            wall_s=self._spent + time.perf_counter() - self._began,
            extra=self._rules | {"finished": self.finished, "complete": complete} | dict(extra or {}),
        )
        if self._path is not None:
            report.write_json(self._path, document)
        return document
