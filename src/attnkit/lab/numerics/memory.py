"""A result file that is its own memory: written after every part of a measurement, and read to go on."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnkit import report
from attnkit._core.errors import OptionError

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
        if resume and path is None:
            raise OptionError(f"resume=True needs out, the folder of the {what} to continue")
        self._path, self._schema, self._rules = path, schema, dict(rules)
        self._command, self._device, self._dtype = command, device, dtype
        self._began, self._spent = time.perf_counter(), 0.0
        self.rows: list[dict[str, Any]] = []
        self.finished: list[str] = []
        if path is None or not path.exists():
            return
        stored = report.read_envelope(path)
        if resume:
            self._require_same(path, stored)
            self.rows, self.finished, self._spent = stored["rows"], stored["finished"], stored["wall_s"]
        elif not stored.get("complete", True):
            raise OptionError(
                f"{path} is an unfinished {what}; continue it with resume (--resume), choose another out (--out), or delete it"
            )

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

    def _require_same(self, path: Path, stored: Mapping[str, Any]) -> None:
        now = report.plain(self._rules | {"schema": self._schema, "device": self._device, "versions": report.versions()})
        for name, value in now.items():
            if stored.get(name) != value:
                raise OptionError(
                    f"cannot resume {path}: it was started with {name}={stored.get(name)}, this call has {value}; "
                    "repeat the first call, or choose another out"
                )
