"""Progress on stderr: a bar on a terminal, one line per 10 % anywhere else, nothing when silenced."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["Progress", "duration"]


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


class Progress:
    """Done / total, rate and time left of one job; use as a context manager.

    Args:
        title: what the job is, a few words.
        total: number of steps.
        silent: print nothing (`--quiet`, `--json`).
    """

    def __init__(self, title: str, total: int, *, silent: bool = False) -> None:
        self.title, self.total, self.done = title, total, 0
        self._silent = silent
        self._started = time.monotonic()
        self._tenths = 0
        self._bar: RichProgress | None = None
        self._task: object = None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if not self._silent and sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task(self.title, total=self.total, note="", rate="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count steps as done; `note` says what was just finished."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, note=note, rate=self._rate())  # type: ignore[arg-type]
        elif not self._silent:
            self._line(note)

    def finish(self) -> None:
        """Count what is left as done: steps that turned out to need no work."""
        if self.done < self.total:
            self.advance(self.total - self.done)

    def phase(self, text: str) -> None:
        """Announce something that may take longer than two seconds ("loading the model")."""
        if self._bar is not None:
            self._bar.console.print(text, style="dim", markup=False, highlight=False)
        elif not self._silent:
            print(text, file=sys.stderr, flush=True)

    def _rate(self) -> str:
        elapsed = time.monotonic() - self._started
        rate = self.done / elapsed if elapsed > 0 else 0.0
        return f"{rate:,.0f}/s" if rate >= 1000 else f"{rate:.3g}/s" if rate else "-"

    def _line(self, note: str) -> None:
        tenths = 10 if self.done >= self.total else 10 * self.done // self.total
        if tenths <= self._tenths:
            return
        self._tenths = tenths
        elapsed = time.monotonic() - self._started
        left = elapsed / max(self.done, 1) * (self.total - self.done)
        text = f"{self.title}: {10 * tenths} % ({self.done:,}/{self.total:,}), {self._rate()}, {duration(left)} left"
        print(f"{text}, {note}" if note else text, file=sys.stderr, flush=True)


def _bar() -> "RichProgress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )
