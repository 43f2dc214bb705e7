"""What memory tensors hold on to, and copies of them."""

from typing import Any

from torch import Tensor

__all__ = ["copied", "storages"]


def storages(value: object) -> dict[int, int]:
    """Address -> bytes of every block of memory that the tensors in `value` (nested lists, tuples, dicts) hold on to."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return {address: size for part in parts for address, size in storages(part).items()}


def copied(value: Any) -> Any:
    """`value` with every tensor in it (nested lists, tuples, dicts) copied."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(copied(part) for part in value)
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return value
