"""The environment variables attnkit reads; none of them changes numerics."""

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Settings", "settings"]


@dataclass(frozen=True)
class Settings:
    """A snapshot of the environment.

    Attributes:
        disable: ATTNKIT_DISABLE, comma-separated `operator.backend` pairs that must not be chosen ("attention.sdpa").
        cache_dir: ATTNKIT_CACHE_DIR, where fetched assets and tuned tables are kept; None means the platform's place.
    """

    disable: frozenset[str]
    cache_dir: Path | None

    def cache_path(self) -> Path:
        """The folder for files that can be fetched or computed again."""
        if self.cache_dir is not None:
            return self.cache_dir
        import platformdirs

        return Path(platformdirs.user_cache_dir("attnkit"))


def settings() -> Settings:
    """Read the environment now."""
    names = os.environ.get("ATTNKIT_DISABLE", "").split(",")
    folder = os.environ.get("ATTNKIT_CACHE_DIR")
    return Settings(
        disable=frozenset(name.strip() for name in names if name.strip()),
        cache_dir=Path(folder).expanduser() if folder else None,
    )
