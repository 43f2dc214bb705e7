"""The log of a run: one JSON line for every logged step, and the same lines when the run goes on."""

import json
from pathlib import Path
from typing import Any

from attnkit import report
from attnkit._core.errors import InputError

__all__ = ["Journal"]


class Journal:
    """`log.jsonl` of a run.

    Args:
        path: of the file; lines are appended, and rewritten whole when a run goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []

    def begin(self, step: int) -> None:
        """Keep the lines up to `step`, 0 for a new run; later ones are written again, the same.

        Raises:
            InputError: a line that is kept is not JSON.
        """
        self.lines = [line for line in self._read() if line["step"] <= step] if step else []
        report.write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; each has a `step`."""
        entry = report.plain(line)
        self.lines.append(entry)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, allow_nan=False) + "\n")

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = self.path.read_text("utf-8").split("\n")
        found = []
        for number, text in enumerate(lines[:-1]):  # what follows the last line end was being written when the run ended
            try:
                entry = json.loads(text)
                found.append(entry | {"step": int(entry["step"])})
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{self.path} line {number + 1} is not a line of a log; delete the file") from error
        return found
