from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and lose much when other processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Window policies drop keys after a few tokens instead of hundreds."""
    from attnkit.inference.prefill import window

    monkeypatch.setattr(window, "CROP_SLACK", 5)
