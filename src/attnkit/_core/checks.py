"""Checks at the public boundary: one wording for every input error."""

from collections.abc import Collection

import torch
from torch import Tensor

from attnkit._core.errors import DTypeError, InputError, OptionError, ShapeError

__all__ = ["FLOATS", "accumulator_dtype", "check_choice", "check_dtype", "check_same", "dims"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dims(**tensors: tuple[Tensor, str]) -> dict[str, int]:
    """Bind the letters of shape patterns to sizes and check that equal letters agree.

    Args:
        tensors: argument name -> (tensor, pattern), e.g. `q=(q, "B T H D")`; a number in a pattern must match exactly.
    Returns:
        letter -> size.
    Raises:
        ShapeError: a rank differs from its pattern, or a letter has two sizes.
    """
    sizes: dict[str, int] = {}
    owners: dict[str, str] = {}
    for name, (tensor, pattern) in tensors.items():
        letters = pattern.split()
        if tensor.dim() != len(letters):
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}; expected {len(letters)} dimensions [{', '.join(letters)}]"
            )
        for letter, size in zip(letters, tensor.shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            owner = owners.setdefault(letter, name)
            if size != expected:
                source = "" if letter.isdigit() else f" as in {owner}"
                raise ShapeError(
                    f"{name} has shape {tuple(tensor.shape)} for [{', '.join(letters)}]; {letter} must be {expected}{source}"
                )
    return sizes


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Refuse a dtype that is not listed.

    Raises:
        DTypeError: names the argument, what came and what is allowed.
    """
    if tensor.dtype not in allowed:
        names = ", ".join(_short(dtype) for dtype in allowed)
        raise DTypeError(f"{name} is {_short(tensor.dtype)}; allowed: {names}")


def check_same(**tensors: Tensor | None) -> None:
    """Require one dtype and one device of all tensors that are given.

    Raises:
        DTypeError: two dtypes.
        InputError: two devices.
    """
    present = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first, reference = present[0]
    for name, tensor in present[1:]:
        if tensor.dtype != reference.dtype:
            raise DTypeError(f"{name} is {_short(tensor.dtype)} but {first} is {_short(reference.dtype)}; convert one of them")
        if tensor.device != reference.device:
            raise InputError(f"{name} is on {tensor.device} but {first} is on {reference.device}; move one of them")


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Refuse a value that is not among the allowed ones.

    Raises:
        OptionError: names the argument, what came and what is allowed.
    """
    if value not in allowed:
        raise OptionError(f"{name}={value!r} is not allowed; choose one of {', '.join(map(repr, allowed))}")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulators, log-sum-exps and recurrent states: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
