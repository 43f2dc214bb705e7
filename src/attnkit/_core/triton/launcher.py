"""Launching a kernel that was launched before on arguments of the same kind, without working out its variant again.

Triton derives the variant of a kernel from every argument at every launch, which for fifty arguments takes longer than a
small kernel runs. Equal integers and flags, and tensors of equal types on equally aligned addresses, give the same variant:
this remembers it.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["launch", "power_of_two", "precision"]

_CAPACITY = 4096  # shapes that never come back (a growing cache of keys) must not pile up
_ALIGNMENT = 16  # what Triton distinguishes, bytes
_variants: dict[Any, tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], flags: dict[str, Any], **options: int) -> None:
    """Run `kernel[grid](*arguments, **flags, **options)` on the current device.

    Args:
        kernel: a function under triton.jit.
        grid: at most three sizes.
        arguments: tensors, numbers and None, in the kernel's order, before its compile-time flags.
        flags: the compile-time flags.
        options: num_warps, num_stages, launch_pdl ..
    """
    # a list first: a generator takes a third longer, at every launch
    kinds = tuple([(a.dtype, a.data_ptr() % _ALIGNMENT) if isinstance(a, Tensor) else a for a in arguments])
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    key = (id(kernel), device, kinds, tuple(flags.values()), tuple(options.values()))
    known = _variants.get(key)
    if known is not None:
        compiled, constants = known
        compiled[(*grid, 1, 1)](*arguments, *constants)
        return
    compiled = kernel[grid](*arguments, **flags, **options)
    if compiled is not None:  # the interpreter compiles nothing
        if len(_variants) >= _CAPACITY:
            _variants.clear()
        _variants[key] = compiled, tuple(flags[name] for name in kernel.arg_names[len(arguments) :])


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is below neither n nor `least` (Triton's own function of this kind takes microseconds)."""
    return max(least, 1 << (n - 1).bit_length())


def precision() -> str:
    """How kernels multiply float32: as torch was allowed to."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"  # set by either API
