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
    cache_dir: str | None

    def cache_path(self) -> Path:
        """The folder for files that can be fetched or computed again."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        import platformdirs

        return Path(platformdirs.user_cache_dir("attnkit"))


def settings() -> Settings:
    """Read the environment now; every choice of a backend does, so it must be cheap."""
    names = os.environ.get("ATTNKIT_DISABLE")
    disable = frozenset(name.strip() for name in names.split(",") if name.strip()) if names else frozenset()
    return Settings(disable, os.environ.get("ATTNKIT_CACHE_DIR") or None)
