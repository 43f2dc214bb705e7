"""Attempts that a worker process can import."""

import os
import time


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
