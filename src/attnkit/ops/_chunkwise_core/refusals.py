"""What the kernels of recurrences cannot do, and where they should not run by themselves."""

import torch

from attnkit._core.devices import capability
from attnkit._core.triton import HAS_TRITON, interpreted
from attnkit.ops._chunkwise_core._triton.configs import LONGEST_CHUNK, WIDEST
from attnkit.ops._chunkwise_core.call import RecurrentCall

__all__ = ["triton_avoids", "triton_refuses"]


def triton_refuses(call: RecurrentCall) -> list[str]:
    """Reasons why no kernel can run the call; none means yes."""
    if not HAS_TRITON:
        return ["Triton is not installed; run: pip install 'attnkit[triton]'"]
    device, dtype = call.q.device, call.q.dtype
    reasons = [f"{dtype} (the kernels take 16 and 32 bits)"] if dtype == torch.float64 else []
    if call.k.shape[-1] > WIDEST:
        reasons.append(f"D={call.k.shape[-1]} (a program holds keys whole, up to {WIDEST})")
    if call.chunk_size > LONGEST_CHUNK:
        reasons.append(f"chunk_size={call.chunk_size} (the kernels take up to {LONGEST_CHUNK})")
    if device.type == "cpu" and interpreted():
        if dtype in (torch.float16, torch.bfloat16):
            reasons.append(f"{dtype} (Triton's interpreter computes bfloat16 wrongly and float16 slowly)")
    elif device.type != "cuda":
        reasons.append(f"device {device.type}")
    elif capability(device) < (8, 0):
        reasons.append("a GPU older than compute capability 8.0")
    return reasons


def triton_avoids(call: RecurrentCall) -> list[str]:
    """Where they should not run by themselves."""
    return ["Triton's interpreter only runs when named"] if call.q.device.type == "cpu" else []
