"""Where no kernel can run, whatever it computes, and where none should run by itself."""

import torch

from attnkit._core.devices import capability
from attnkit._core.triton import HAS_TRITON, interpreted

__all__ = ["kernels_avoid", "kernels_refuse", "old_gpu"]


def kernels_refuse(device: torch.device, dtype: torch.dtype, *own: str) -> list[str]:
    """Reasons why no kernel can run a call; none means yes.

    Args:
        device, dtype: of its tensors.
        own: what the operator's own kernels cannot do of it; not said where there is no Triton at all.
    """
    if not HAS_TRITON:
        return ["Triton is not installed; run: pip install 'attnkit[triton]'"]
    reasons = [f"{dtype} (the kernels take 16 and 32 bits)"] if dtype == torch.float64 else []
    reasons += own
    if device.type == "cpu" and interpreted():
        if dtype in (torch.float16, torch.bfloat16):
            reasons.append(f"{dtype} (Triton's interpreter computes bfloat16 wrongly and float16 slowly)")
        return reasons
    return [*reasons, *(old_gpu(device) if device.type == "cuda" else [f"device {device.type}"])]


def kernels_avoid(device: torch.device) -> list[str]:
    """Why they should not run by themselves."""
    return ["Triton's interpreter only runs when named"] if device.type == "cpu" else []


def old_gpu(device: torch.device) -> list[str]:
    """Why a GPU is too old for matrix units of 16 bits; none where it is not."""
    return ["a GPU older than compute capability 8.0"] if capability(device) < (8, 0) else []
