"""Attempts that a worker process can import."""

import multiprocessing
import os
import sys
import time

from attnkit.lab.pool import Pool


def attempt(task: str) -> str:
    """Do what the task says."""
    if task == "die":
        os._exit(7)
    if task == "hang":
        time.sleep(60)
    if task == "break":
        raise SystemExit("the device is gone")
    return task


def slow(task: str) -> str:
    """Take a moment."""
    time.sleep(0.4)
    return task


def pid(task: str) -> str:
    """In which process it ran."""
    return str(os.getpid())


def interrupted() -> None:
    """Run a pool until Ctrl-C; print when to send it, and what is left of the processes."""
    starting = sys.argv[1] == "starting"
    try:
        with Pool.open(ToldStart() if starting else attempt, 1 if starting else 2) as pool:
            for _ in pool.finished(["", "hang", "hang"]):
                print(sys.argv[1], flush=True)
    except KeyboardInterrupt:
        print(f"interrupted, {len(multiprocessing.active_children())} left")


def load_and_tell() -> object:
    """What it takes to load `ToldStart`."""
    print("starting", os.getpid(), flush=True)
    time.sleep(60)
    return attempt


class ToldStart:
    """An attempt whose process says when it is about to start, and does not get further."""

    def __call__(self, task: str) -> str:
        return task

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return load_and_tell, ()


def load_slowly() -> object:
    """What it takes to load `SlowStart`."""
    time.sleep(1.0)
    return slow


class SlowStart:
    """An attempt whose process needs longer to start than an attempt may take."""

    def __call__(self, task: str) -> str:
        return task

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return load_slowly, ()


class NoStart:
    """An attempt that no process can load."""

    def __call__(self, task: str) -> str:
        return ""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (1,)
