"""Devices: in words, what they can do, and making one the current one."""

import contextlib

import torch

__all__ = ["capability", "current", "device_name"]

_capabilities: dict[torch.device, tuple[int, int]] = {}
_NOTHING = contextlib.nullcontext()


def device_name(device: torch.device) -> str:
    """What a device is called in results: the GPU's name, else its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU, remembered: choosing a backend asks several times a call."""
    if torch.compiler.is_compiling() or device.index is None:
        return torch.cuda.get_device_capability(device)
    found = _capabilities.get(device)
    if found is None:
        found = _capabilities[device] = torch.cuda.get_device_capability(device)
    return found


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which `device` is the current GPU, where kernels are launched; free where it is so already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)
