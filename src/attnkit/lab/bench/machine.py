"""What a result must say about the machine and the code, and Triton's cache during a race."""

import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import attnkit
from attnkit.lab.bench.timing import elapsed

__all__ = ["cache_bytes", "cold_kernels", "commit", "copies_beyond_cache", "copy_gb_s", "package_version"]

_CACHE = "TRITON_CACHE_DIR"
_COPIED = {"cuda": 2**30, "cpu": 2**26}  # bytes; many times the last-level cache on a GPU, twice it on common CPUs
_CPU_CACHE = 2**25
_CACHES = 3  # what a step reads that is bound by memory is together this many times the last-level cache


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; on a CPU, which torch cannot ask, 32 MiB."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else _CPU_CACHE


def copies_beyond_cache(device: torch.device, size: int) -> int:
    """How many tensors of `size` bytes are taken in turns, so that none is still on chip when its turn comes again."""
    return -(-_CACHES * cache_bytes(device) // size)


def copy_gb_s(device: torch.device) -> float:
    """Measured rate of a copy from memory to memory in 1e9 bytes a second, reads and writes counted."""
    source = torch.zeros(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    elapsed(device, copy, 2)  # the first touch of a page costs more than a copy
    return 2 * source.nbytes / statistics.median(elapsed(device, copy, 4) for _ in range(5)) / 1e9


def commit() -> str | None:
    """Hash of attnkit's commit, with "-dirty" where the package differs from it; None outside its own git checkout."""
    package = Path(attnkit.__file__)
    if _git(package.parent, "ls-files", "--error-unmatch", package.name) is None:  # installed in somebody else's checkout
        return None
    changes = _git(package.parent, "status", "--porcelain", "--", ".")
    return f"{_git(package.parent, 'rev-parse', 'HEAD')}{'-dirty' if changes else ''}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_version(package: str) -> str | None:
    """Version of a distribution; None where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def cold_kernels() -> Iterator[bool]:
    """Give Triton an empty cache folder inside the block, so that what it compiles there is compiled there.

    Yields whether our kernels are cold: what this process has compiled before stays in its memory, and cannot be taken
    out. (Triton 3.6 reads the folder's name whenever it compiles, so it may have been imported before.)
    """
    warm = "triton" in sys.modules and any(re.match(r"attnkit\..*\._triton\b", name) for name in sys.modules)
    before = os.environ.get(_CACHE)
    with tempfile.TemporaryDirectory(prefix="attnkit-race-", ignore_cleanup_errors=True) as folder:
        os.environ[_CACHE] = folder
        try:
            yield not warm
        finally:
            if before is None:
                del os.environ[_CACHE]
            else:
                os.environ[_CACHE] = before
