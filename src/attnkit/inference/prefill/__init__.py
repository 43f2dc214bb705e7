"""Prefill methods: what each query sees."""

from attnkit.inference.methods import PREFILLS
from attnkit.inference.prefill.dense import Dense
from attnkit.inference.prefill.hashed import Hashed
from attnkit.inference.prefill.window import Window

__all__ = ["Dense", "Hashed", "Window"]

for _method in (Dense, Window, Hashed):
    PREFILLS.register(_method.name, _method)
