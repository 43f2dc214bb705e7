"""Races in tests measure for a moment only."""

import pytest

from attnkit.lab.bench import machine, timing


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MEASURED_S", 0.001)
    monkeypatch.setattr(machine, "_COPIED", {"cpu": 2**22, "cuda": 2**26})
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 2**16)
