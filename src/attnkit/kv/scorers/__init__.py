"""Scorers: how much each stored key is worth. A file holds a family; all are frozen dataclasses of their options."""

import functools
import importlib

__all__ = ["load"]

_FILES = (
    "simple",
    "attention",
    "keys",
    "leverage",
    "expected",
    "protect",
    "critical",
    "patterns",
    "gates",
    "replay",
    "gradient",
    "restore",
    "matching",
)


@functools.cache
def load() -> None:
    """Register every method."""
    for name in ("chunks", "transforms"):
        importlib.import_module(f"attnkit.kv.{name}")
    for name in _FILES:
        importlib.import_module(f"attnkit.kv.scorers.{name}")
