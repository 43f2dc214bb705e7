"""Instruments: what a method keeps, what it costs, and how far a result is from the truth."""

from attnkit._core.lazy import lazy_attributes

__all__ = ["bench", "claims", "compare", "numerics", "tune"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    modules={name: f"attnkit.lab.{name}" for name in __all__},
)
