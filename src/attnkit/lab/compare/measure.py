"""Clocks and memory of one forward pass."""

import contextlib
import ctypes
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

__all__ = ["PeakMemory", "clock"]

MIB = 2**20
_STATM = Path("/proc/self/statm")
_INTERVAL_S = 0.002


def clock(device: torch.device) -> float:
    """Seconds, read when the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PeakMemory:
    """The largest memory inside a `with` block beyond what was in use before it.

    On CUDA from the allocator, exact. On a CPU from the resident size of the process, looked at every 2 ms by a thread: good
    to about a tenth, since malloc returns freed pages when it likes (making it return them at once slows the pass by a
    sixth).

    Attributes:
        mib: the result, after the block; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.mib: float | None = None
        self._cuda = device if device.type == "cuda" else None
        self._before = self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before = torch.cuda.memory_allocated(self._cuda)
        elif _STATM.exists():
            _return_free_memory()
            self._before = self._peak = _resident()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._cuda is not None:
            self.mib = (torch.cuda.max_memory_allocated(self._cuda) - self._before) / MIB
        elif self._thread.ident is not None:
            self._done.set()
            self._thread.join()
            self.mib = (max(self._peak, _resident()) - self._before) / MIB

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    # without pages of files: weights and libraries that are mapped come and go as the system likes
    _, resident, shared, *_ = map(int, _STATM.read_bytes().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _return_free_memory() -> None:
    # pages that malloc keeps would hide what the next pass allocates: the first one measured would look the largest
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
