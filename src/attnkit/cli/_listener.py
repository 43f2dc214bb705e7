"""The events of a long measurement as progress on stderr."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from attnkit.cli._common import Progress, warn

if TYPE_CHECKING:
    from attnkit._core.events import Event

__all__ = ["Listener"]


class Listener:
    """Turns events into a progress bar and warnings, and says what is kept when it is interrupted.

    Args:
        title: what is done, in one word ("comparing").
        out: where finished parts are kept.
        silent: no progress; warnings are still written.
        advice: how the rest is done after an interruption.
        unit: what events count.
    """

    def __init__(
        self,
        title: str,
        out: Path,
        *,
        silent: bool,
        advice: str = "the same command with --resume goes on",
        unit: str = "steps",
    ) -> None:
        self._title, self._out, self._silent, self._advice, self._unit = title, out, silent, advice, unit
        self._progress: Progress | None = None
        self._stack = contextlib.ExitStack()
        self._last: Event | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator["Listener"]:
        """The time in which events come."""
        with self._stack:
            try:
                yield self
            except KeyboardInterrupt:
                self._stack.close()
                if self._last is not None:
                    done = f"{self._last.done:,} of {self._last.total:,} {self._unit} are kept in {self._out}"
                    warn(f"{done}; {self._advice}")
                raise

    def hear(self, event: "Event") -> None:
        """One event."""
        before, self._last = self._last, event
        if event.kind == "warning":
            warn(event.text)
        elif event.kind == "phase" and self._progress is not None:
            self._progress.phase(event.text)
        elif event.kind == "phase" and not self._silent:
            click.echo(event.text, err=True)
        elif event.kind == "plan":
            title = f"{self._title} ({event.done:,} done before)" if event.done else self._title
            self._progress = self._stack.enter_context(Progress(title, event.total - event.done, silent=self._silent))
        elif self._progress is not None:
            self._progress.advance(event.done - (before.done if before else 0), note=event.text)
