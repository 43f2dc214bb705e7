"""What kernels of several operators share, and whether there is a Triton to run them; loads Triton nowhere by itself."""

import importlib.util
import os

__all__ = ["HAS_TRITON", "interpreted"]

HAS_TRITON = importlib.util.find_spec("triton") is not None  # a constant: torch.compile traces what asks for it


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: its own switch, read when Triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
