import time

import pytest
import torch

from attnkit.lab.compare.measure import PeakMemory, clock

CPU = torch.device("cpu")
MIB = 2**20


def test_the_clock_counts_seconds() -> None:
    before = clock(CPU)
    time.sleep(0.05)
    assert 0.05 <= clock(CPU) - before < 1


@pytest.mark.parametrize("repeat", range(3))
def test_the_peak_is_what_was_held_at_once_beyond_what_was_there(repeat: int) -> None:
    there = torch.ones(64 * MIB // 4)
    with PeakMemory(CPU) as peak:
        for _ in range(4):  # freed again each time, so not the sum
            held = torch.ones(48 * MIB // 4) + 1
            time.sleep(0.02)
            del held
    assert peak.mib is not None
    assert 46 < peak.mib < 110  # one tensor, or two while they are added
    assert there.sum() == there.numel()


def test_holes_in_the_heap_are_not_counted() -> None:
    """Many freed pieces of just the right size: each new tensor lies in another one."""
    pieces = [torch.ones(24 * MIB // 4) for _ in range(16)]
    walls = [torch.ones(1024) for _ in pieces]
    del pieces
    with PeakMemory(CPU) as peak:
        for _ in range(8):
            held = torch.ones(20 * MIB // 4)
            time.sleep(0.005)
            del held
    assert peak.mib == pytest.approx(20, abs=2)
    assert len(walls) == 16


def test_memory_that_stays_counts_too() -> None:
    with PeakMemory(CPU) as peak:
        kept = torch.ones(80 * MIB // 4)
    assert peak.mib == pytest.approx(80, abs=8)
    assert kept[0] == 1


def test_memory_is_not_reported_where_the_allocator_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnkit.lab.compare.measure._MALLINFO", None)
    with PeakMemory(CPU) as peak:
        torch.ones(MIB)
    assert peak.mib is None
