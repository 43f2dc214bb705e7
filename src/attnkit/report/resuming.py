"""Going on with a result file that is its own memory: when that is allowed, and what is said when it is not."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attnkit._core.errors import OptionError
from attnkit.report.files import read_envelope

__all__ = ["earlier", "require_same"]


def earlier(path: Path | None, what: str, *, resume: bool) -> dict[str, Any] | None:
    """The envelope to go on from, or None where a measurement begins anew.

    Args:
        path: of the result file; None keeps nothing on disk.
        what: is measured, for messages ("race").
        resume: whether the caller wants to go on.
    Raises:
        OptionError: `resume` without a file to keep; or the file is unfinished and `resume` is not set.
        InputError: the file is damaged.
    """
    if resume and path is None:
        raise OptionError(f"resume=True needs out, the folder of the {what} to continue")
    if path is None or not path.exists():
        return None
    stored = read_envelope(path)
    if resume:
        return stored
    if not stored.get("complete", True):
        raise OptionError(
            f"{path} is an unfinished {what}; continue it with resume (--resume), choose another out (--out), or delete it"
        )
    return None


def require_same(
    place: Path, before: Mapping[str, Any], now: Mapping[str, Any], *, show: Callable[[object], str] = str
) -> None:
    """Refuse to go on with what was begun under other rules.

    Args:
        place: the file or folder, for the message.
        before: what it says.
        now: rule -> value of this call, as JSON holds it; all of them must be the same.
        show: a value in words.
    Raises:
        OptionError: a rule differs; the message names the first.
    """
    for name, value in now.items():
        if before.get(name) != value:
            raise OptionError(
                f"cannot resume {place}: it was started with {name}={show(before.get(name))}, this call has {show(value)}; "
                "repeat the first call, or choose another out"
            )
