"""Devices in words."""

import torch

__all__ = ["device_name"]


def device_name(device: torch.device) -> str:
    """What a device is called in results: the GPU's name, else its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
