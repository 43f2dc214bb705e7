from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def _one_thread(set_threads: Callable[[int], None]) -> None:
    """Tiny models gain nothing from a second thread, and lose much when other processes share the cores."""
    set_threads(1)
