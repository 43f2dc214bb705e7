"""Helpers for tests, of attnkit and of code that uses it; nothing that ships imports them."""

from attnkit._core.lazy import lazy_attributes

__all__ = ["FAMILIES", "randomise", "tiny_model"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    names={
        "FAMILIES": "attnkit.testing.models",
        "randomise": "attnkit.testing.models",
        "tiny_model": "attnkit.testing.models",
    },
)
