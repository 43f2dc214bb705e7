"""What kernels of several operators share, and whether there is a Triton to run them; loads Triton nowhere by itself."""

import importlib.util
import os
from functools import cache

__all__ = ["has_triton", "interpreted"]


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: its own switch, read when Triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
