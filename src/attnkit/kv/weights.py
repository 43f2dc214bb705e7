"""Reading what was learnt beforehand: tables of heads and the weights of gates. Nothing is unpickled."""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnkit._core.errors import InputError, OptionError, ShapeError

__all__ = ["device_copy", "required", "table", "tensors"]


def required(path: str | None, method: str, what: str) -> str:
    """The path, which must have been given.

    Raises:
        OptionError: it was not; says what is needed.
    """
    if not path:
        raise OptionError(f"{method} needs {what}; give its path as an option")
    return str(path)


def tensors(path: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        InputError: another kind of file, or none.
    """
    return _read(path, _changed(path))


def device_copy(path: str, name: str, device: torch.device) -> Tensor:
    """One tensor of a safetensors file, float32, on a device.

    Raises:
        InputError: the file has no tensor of that name.
    """
    return _copy(path, _changed(path), name, device)


def table(path: str, name: str, dims: int) -> Tensor:
    """A table of float32: a tensor of a safetensors file, a `.npy` array, or lines of numbers apart by tabs (`.tsv`).

    Args:
        path: the file.
        name: of the tensor, in a safetensors file.
        dims: how many dimensions it must have.
    Raises:
        InputError: no such file or tensor.
        ShapeError: another number of dimensions.
    """
    found = (
        _array(path, _changed(path)) if Path(path).suffix in (".npy", ".tsv") else device_copy(path, name, torch.device("cpu"))
    )
    if found.dim() != dims:
        raise ShapeError(f"{path} holds a table of shape {tuple(found.shape)}; {dims} dimensions are expected")
    return found


def _changed(path: str) -> int:
    """When the file was written, so that a newer one is read anew."""
    try:
        return Path(path).stat().st_mtime_ns
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


@functools.lru_cache(maxsize=8)
def _read(path: str, changed: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    del changed
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: {error}; a safetensors file is expected (pickled weights have to be converted)") from error


@functools.lru_cache(maxsize=512)  # of gates: seven tensors a layer
def _copy(path: str, changed: int, name: str, device: torch.device) -> Tensor:
    held = _read(path, changed)
    if name not in held:
        raise InputError(f"{path} has no tensor {name!r}; it has {', '.join(sorted(held)[:8]) or 'none'}")
    return held[name].to(device, torch.float32)


@functools.lru_cache(maxsize=8)
def _array(path: str, changed: int) -> Tensor:
    del changed
    try:
        array = np.load(path, allow_pickle=False) if path.endswith(".npy") else np.loadtxt(path, delimiter="\t", ndmin=2)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return torch.as_tensor(array, dtype=torch.float32)
