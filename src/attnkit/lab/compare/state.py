"""What a comparison has measured so far, on disk after every step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnkit import report
from attnkit._core.errors import InputError, OptionError
from attnkit.report.resuming import require_same

__all__ = ["State"]

FILE = "state.json"
SCHEMA = "attnkit.compare.state/1"


class State:
    """Results of single steps by key, kept in `out/state.json` where there is a folder.

    Args:
        out: the folder; None keeps results in memory only.
        config: everything that decides the results, as JSON values.
        resume: go on with what the folder holds.
    Raises:
        OptionError: the folder holds an unfinished comparison and `resume` is not set, or one of another configuration; or
            `resume` is set and there is no folder.
        InputError: the file in it is damaged.

    Attributes:
        results: key -> what was recorded.
        wall_s: seconds spent, over all sessions.
    """

    def __init__(self, out: Path | None, config: Mapping[str, Any], *, resume: bool) -> None:
        if resume and out is None:
            raise OptionError("resume=True needs out, the folder of the comparison to continue")
        self._path = None if out is None else out / FILE
        self._config = report.plain(config)
        self.results: dict[str, Any] = {}
        self.wall_s = 0.0
        if self._path is None or not self._path.exists():
            return
        stored = _read(self._path)
        if resume:
            self._require_same(stored["config"])
            self.results, self.wall_s = stored["results"], stored["wall_s"]
        elif not stored["finished"]:
            raise OptionError(
                f"{self._path.parent} holds an unfinished comparison; continue it with resume (--resume), choose another out "
                f"(--out), or delete {self._path}"
            )

    def add(self, key: str, result: Mapping[str, Any], *, wall_s: float) -> None:
        """Record one step."""
        self.results[key] = report.plain(result)
        self.wall_s = wall_s
        self.write(finished=False)

    def write(self, *, finished: bool) -> None:
        """Put everything on disk, whole or not at all."""
        if self._path is not None:
            values = {"schema": SCHEMA, "config": self._config, "finished": finished}
            report.write_json(self._path, {**values, "wall_s": self.wall_s, "results": self.results})

    def _require_same(self, stored: Mapping[str, Any]) -> None:
        assert self._path is not None
        require_same(self._path.parent, stored, {**dict.fromkeys(stored), **self._config}, show=_short)


def _short(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _read(path: Path) -> dict[str, Any]:
    advice = f"delete {path} and start again"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged; {advice}") from error
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
        raise InputError(f"{path} was not written by this version; {advice}")
    return stored
