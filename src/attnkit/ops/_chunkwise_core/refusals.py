"""What the kernels of recurrences cannot do, and where they should not run by themselves."""

from attnkit._core.triton.refusals import kernels_avoid, kernels_refuse
from attnkit.ops._chunkwise_core._triton.configs import LONGEST_CHUNK, WIDEST
from attnkit.ops._chunkwise_core.call import RecurrentCall

__all__ = ["triton_avoids", "triton_refuses"]


def triton_refuses(call: RecurrentCall) -> list[str]:
    """Reasons why no kernel can run the call; none means yes."""
    own = []
    if call.k.shape[-1] > WIDEST:
        own.append(f"D={call.k.shape[-1]} (a program holds keys whole, up to {WIDEST})")
    if call.chunk_size > LONGEST_CHUNK:
        own.append(f"chunk_size={call.chunk_size} (the kernels take up to {LONGEST_CHUNK})")
    return kernels_refuse(call.q.device, call.q.dtype, *own)


def triton_avoids(call: RecurrentCall) -> list[str]:
    """Where they should not run by themselves."""
    return kernels_avoid(call.q.device)
