"""Worker processes for attempts that may fail, hang or take their process down with them."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from attnkit._core.errors import BackendUnavailable

__all__ = ["Attempt", "Pool"]

Attempt = Callable[[Any], str]
"""A task -> why it failed, "" where it did not; SystemExit(reason) where the process can do no more."""

_STARTING_S = 300.0  # for importing what it needs, from a slow disk
_NO_START = (
    'a worker process does not start: {}; a script has to call this under `if __name__ == "__main__":`, and workers=0 does '
    "without processes"
)


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    since: float  # when it began with what it does
    task: int | None = None  # index of the one it works on
    ready: bool = False  # whether it has started; a task given before waits in its pipe


class Pool:
    """Runs attempts in processes of their own. One that dies or is too slow costs its attempt and is replaced.

    Args:
        attempt: a function of a module, which a new process can import.
        workers: how many at a time; 0 makes the attempts in this process.
        limit_s: seconds after which an attempt is given up.
    """

    def __init__(self, attempt: Attempt, workers: int, limit_s: float) -> None:
        self._attempt, self._count, self._limit_s = attempt, workers, limit_s
        self._workers: list[_Worker] = []

    @classmethod
    @contextmanager
    def open(cls, attempt: Attempt, workers: int, limit_s: float) -> Iterator["Pool"]:
        """A pool whose processes end with the block."""
        pool = cls(attempt, workers, limit_s)
        try:
            yield pool
        finally:
            for worker in tuple(pool._workers):
                pool._end(worker)

    def run(self, tasks: Sequence[Any]) -> list[str]:
        """Make every attempt; for each the reason why it failed, "" where it did not.

        Raises:
            BackendUnavailable: worker processes do not start.
        """
        if not self._count:
            return [_made_here(self._attempt, task) for task in tasks]
        reasons: dict[int, str] = {}
        todo = list(range(len(tasks)))[::-1]
        while len(reasons) < len(tasks):
            while todo and self._idle_or_started():
                worker = next(worker for worker in self._workers if worker.task is None)
                worker.task, worker.since = todo.pop(), time.monotonic()
                try:
                    worker.pipe.send(tasks[worker.task])
                except OSError:  # it has ended since its last attempt
                    todo.append(worker.task)
                    self._end(worker)
            reasons |= dict(self._finished())
        return [reasons[index] for index in range(len(tasks))]

    def _idle_or_started(self) -> bool:
        """Whether somebody can take a task, a new process if there may be one more."""
        if any(worker.task is None for worker in self._workers):
            return True
        if len(self._workers) == self._count:
            return False
        context = multiprocessing.get_context("spawn")  # a fork would inherit a CUDA context that it cannot use
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._attempt), daemon=True)
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours, time.monotonic()))
        return True

    def _finished(self) -> Iterator[tuple[int, str]]:
        """Wait until something happens; attempts that are over, and why they failed."""
        busy = {worker.pipe: worker for worker in self._workers if worker.task is not None}
        rest = min(self._deadline(worker) for worker in busy.values()) - time.monotonic()
        told = wait(list(busy), timeout=max(rest, 0.0))
        for pipe, worker in busy.items():
            assert worker.task is not None
            task = worker.task
            if pipe in told:
                reason = self._answer(worker)
                if reason is not None:
                    yield task, reason
            elif time.monotonic() > self._deadline(worker):
                self._end(worker)
                if not worker.ready:
                    raise BackendUnavailable(_NO_START.format(f"nothing heard for {_STARTING_S:.0f} s"))
                yield task, f"not done after {self._limit_s:.0f} s"

    def _deadline(self, worker: _Worker) -> float:
        return worker.since + (self._limit_s if worker.ready else _STARTING_S)

    def _answer(self, worker: _Worker) -> str | None:
        """What a worker says about its attempt; None where it says that it has started."""
        try:
            reason, usable = worker.pipe.recv()
        except (EOFError, OSError):
            self._end(worker)
            died = f"its process died (exit code {worker.process.exitcode})"
            if not worker.ready:
                raise BackendUnavailable(_NO_START.format(died)) from None
            return died
        if not worker.ready:
            worker.ready, worker.since = True, time.monotonic()
            return None
        worker.task = None
        if not usable:
            self._end(worker)
        assert isinstance(reason, str)
        return reason

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()


def _made_here(attempt: Attempt, task: Any) -> str:
    try:
        return attempt(task)
    except SystemExit as error:
        return str(error.code)


def _work(pipe: Connection, attempt: Attempt) -> None:
    """What a worker process does until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked; it ends the workers
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # compilers write there, and so does whoever prints the result
    os.dup2(nowhere, 2)
    pipe.send(("", True))
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((attempt(task), True))
        except SystemExit as error:
            pipe.send((str(error.code), False))
            return
