from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def _one_thread(set_threads: Callable[[int], None]) -> None:
    """Tiny models gain nothing from a second thread, and lose much when other processes share the cores."""
    set_threads(1)


@pytest.fixture
def small_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Window policies drop keys after a few tokens instead of hundreds."""
    from attnkit.inference.prefill import window

    monkeypatch.setattr(window, "CROP_SLACK", 5)
