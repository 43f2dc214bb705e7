"""Worker processes for attempts that may fail, hang or take their process down with them."""

import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from attnkit._core.errors import BackendUnavailable

__all__ = ["Attempt", "Lost", "Pool", "cores", "workers_for"]

Attempt = Callable[[Any], Any]
"""A task -> its result; SystemExit(reason) where the process can do no more."""

_STARTING_S = 300.0  # for importing what it needs, from a slow disk
_WORKER_BYTES = 2**30  # of device memory: a CUDA context, kernels, a problem and its results
_MAX_WORKERS = 16
_NO_START = (
    'a worker process does not start: {}; a script has to call this under `if __name__ == "__main__":`, and {} does '
    "without processes"
)


@dataclass(frozen=True)
class Lost:
    """What stands in the place of a result that never came.

    Attributes:
        reason: why.
    """

    reason: str


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    since: float  # when it began with what it does
    task: int | None = None  # index of the one it works on
    kin: Hashable = None  # of the last one it was given
    ready: bool = False  # whether it has started; a task given before waits in its pipe


class Pool:
    """Runs attempts in processes of their own. One that dies or is too slow costs its attempt and is replaced.

    Args:
        attempt: a function of a module, which a new process can import.
        workers: how many at a time; 0 makes the attempts in this process.
        limit_s: seconds after which an attempt is given up.
        alone: what the caller's user has to say for no processes, for the message when none starts.
    """

    def __init__(self, attempt: Attempt, workers: int, limit_s: float = math.inf, *, alone: str = "workers=0") -> None:
        self._attempt, self._count, self._limit_s, self._alone = attempt, workers, limit_s, alone
        self._workers: list[_Worker] = []

    @classmethod
    @contextmanager
    def open(cls, attempt: Attempt, workers: int, limit_s: float = math.inf, *, alone: str = "workers=0") -> Iterator["Pool"]:
        """A pool whose processes end with the block."""
        pool = cls(attempt, workers, limit_s, alone=alone)
        try:
            yield pool
        finally:
            for worker in tuple(pool._workers):
                pool._end(worker)

    def run(self, tasks: Sequence[Any], kin: Sequence[Hashable] | None = None) -> list[Any]:
        """Make every attempt, as `finished` does; the results in the order of the tasks."""
        results = dict(self.finished(tasks, kin))
        return [results[index] for index in range(len(tasks))]

    def finished(self, tasks: Sequence[Any], kin: Sequence[Hashable] | None = None) -> Iterator[tuple[int, Any]]:
        """Make every attempt; the index and the result of each when it is over, or why it was `Lost`.

        Args:
            kin: one a task, equal for those that one process had better make; None means that none are. A process begins with
                the first kin that no other has, and helps the one with most left when there is none.
        Raises:
            BackendUnavailable: worker processes do not start.
        """
        if not self._count:
            yield from ((index, _made_here(self._attempt, task)) for index, task in enumerate(tasks))
            return
        todo: dict[Hashable, deque[int]] = {}
        for index, key in enumerate(range(len(tasks)) if kin is None else kin):
            todo.setdefault(key, deque()).append(index)
        left = len(tasks)
        while left:
            while any(todo.values()) and self._idle_or_started():
                worker = next(worker for worker in self._workers if worker.task is None)
                worker.task, worker.since = self._choose(worker, todo), time.monotonic()
                try:
                    worker.pipe.send(tasks[worker.task])
                except OSError:  # it has ended since its last attempt
                    todo[worker.kin].appendleft(worker.task)
                    self._end(worker)
            for result in self._over():
                left -= 1
                yield result

    def _choose(self, worker: _Worker, todo: dict[Hashable, deque[int]]) -> int:
        """The next task of a worker, which is taken away from those to do."""
        if todo.get(worker.kin):
            return todo[worker.kin].popleft()
        taken = {other.kin for other in self._workers if other.task is not None}
        alone = next((key for key, tasks in todo.items() if tasks and key not in taken), None)
        worker.kin = max(todo, key=lambda key: len(todo[key])) if alone is None else alone
        return todo[worker.kin].popleft() if alone is not None else todo[worker.kin].pop()

    def _idle_or_started(self) -> bool:
        """Whether somebody can take a task, a new process if there may be one more."""
        if any(worker.task is None for worker in self._workers):
            return True
        if len(self._workers) == self._count:
            return False
        context = multiprocessing.get_context("spawn")  # a fork would inherit a CUDA context that it cannot use
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._attempt), daemon=True)
        with _without_interrupts():
            process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours, time.monotonic()))
        return True

    def _over(self) -> Iterator[tuple[int, Any]]:
        """Wait until something happens; attempts that are over, and their results."""
        busy = {worker.pipe: worker for worker in self._workers if worker.task is not None}
        rest = min(self._deadline(worker) for worker in busy.values()) - time.monotonic()
        told = wait(list(busy), timeout=None if math.isinf(rest) else max(rest, 0.0))
        for pipe, worker in busy.items():
            assert worker.task is not None
            task = worker.task
            if pipe in told:
                yield from ((task, result) for result in self._answer(worker))
            elif time.monotonic() > self._deadline(worker):
                self._end(worker)
                if not worker.ready:
                    raise BackendUnavailable(_NO_START.format(f"nothing heard for {_STARTING_S:.0f} s", self._alone))
                yield task, Lost(f"not done after {self._limit_s:.0f} s")

    def _deadline(self, worker: _Worker) -> float:
        return worker.since + (self._limit_s if worker.ready else _STARTING_S)

    def _answer(self, worker: _Worker) -> Iterator[Any]:
        """The result of a worker's attempt; nothing where it says that it has started."""
        try:
            result, usable = worker.pipe.recv()
        except (EOFError, OSError):
            self._end(worker)
            died = f"its process died (exit code {worker.process.exitcode})"
            if not worker.ready:
                raise BackendUnavailable(_NO_START.format(died, self._alone)) from None
            yield Lost(died)
            return
        if not worker.ready:
            worker.ready, worker.since = True, time.monotonic()
            return
        worker.task = None
        if not usable:
            self._end(worker)
        yield result

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_for(place: torch.device) -> int:
    """As many as there are cores and room on the device for."""
    room = torch.cuda.mem_get_info(place)[0] // _WORKER_BYTES if place.type == "cuda" else cores()
    return max(1, min(cores(), room, _MAX_WORKERS))


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started here is deaf to Ctrl-C, from its first moment on."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would let them in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _made_here(attempt: Attempt, task: Any) -> Any:
    try:
        return attempt(task)
    except SystemExit as error:
        return Lost(str(error.code))


def _work(pipe: Connection, attempt: Attempt) -> None:
    """What a worker process does until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked; it ends the workers
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # compilers write there, and so does whoever prints the result
    os.dup2(nowhere, 2)
    pipe.send((None, True))
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((attempt(task), True))
        except SystemExit as error:
            pipe.send((Lost(str(error.code)), False))
            return
