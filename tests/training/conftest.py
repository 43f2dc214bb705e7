"""Training tests keep their token cache to themselves."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    from training_examples import write_text

    return write_text(tmp_path / "text.txt")
