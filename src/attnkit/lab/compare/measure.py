"""Clocks and memory of one forward pass."""

import ctypes
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch

__all__ = ["PeakMemory", "clock"]

MIB = 2**20
_INTERVAL_S = 0.002


class _MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns; `uordblks` and `hblkhd` are the bytes in use, in its heaps and mapped apart."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
    )


def _allocator() -> Callable[[], Any] | None:
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):  # not glibc 2.33 or newer
        return None
    mallinfo.restype = _MallInfo
    return mallinfo


_MALLINFO = _allocator()


def clock(device: torch.device) -> float:
    """Seconds, read when the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PeakMemory:
    """The largest memory inside a `with` block beyond what was in use before it.

    From the allocator, on CUDA exactly; on a CPU from glibc's count of the bytes in use, looked at every 2 ms by a thread.
    The resident size of the process would count tensors that are freed: in a heap with holes each new one lies elsewhere.

    Attributes:
        mib: the result, after the block; None where the system does not tell.
        held_mib: what is in use after the block beyond what was before it; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.mib: float | None = None
        self.held_mib: float | None = None
        self._cuda = device if device.type == "cuda" else None
        self._before = self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before = torch.cuda.memory_allocated(self._cuda)
        elif _MALLINFO is not None:
            self._before = self._peak = _in_use()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._cuda is not None:
            self.mib = (torch.cuda.max_memory_allocated(self._cuda) - self._before) / MIB
            self.held_mib = (torch.cuda.memory_allocated(self._cuda) - self._before) / MIB
        elif self._thread.ident is not None:
            self._done.set()
            self._thread.join()
            held = _in_use()
            self.mib = (max(self._peak, held) - self._before) / MIB
            self.held_mib = (held - self._before) / MIB

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            self._peak = max(self._peak, _in_use())


def _in_use() -> int:
    assert _MALLINFO is not None
    info = _MALLINFO()
    return int(info.uordblks) + int(info.hblkhd)
