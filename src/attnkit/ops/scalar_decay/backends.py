"""The implementations of scalar decay, in order of preference, each with its reasons to refuse a call."""

from collections.abc import Callable

from torch import Tensor

from attnkit._core.dispatch import Backend, only_when_named
from attnkit.ops._chunkwise_core._register import run_chunkwise, run_chunkwise_triton
from attnkit.ops._chunkwise_core.refusals import triton_avoids, triton_refuses
from attnkit.ops._chunkwise_core.state import RecurrentState
from attnkit.ops.scalar_decay.call import ScalarDecayCall
from attnkit.ops.scalar_decay.reference import MAX_PAIRS, parallel

__all__ = ["BACKENDS"]


def _walk(call: ScalarDecayCall, run: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, RecurrentState]:
    S = None if call.state is None else call.state.S
    out, _, S, _ = run(
        call.q, call.k, call.v, call.g, None, None, S, None, call.cu_seqlens, False, call.scale, 0.0, call.chunk_size
    )
    return out, RecurrentState(S)


def _triton(call: ScalarDecayCall) -> tuple[Tensor, RecurrentState]:
    return _walk(call, run_chunkwise_triton)


def _torch(call: ScalarDecayCall) -> tuple[Tensor, RecurrentState]:
    return _walk(call, run_chunkwise)


def _triton_refuses(call: ScalarDecayCall) -> list[str]:
    reasons = triton_refuses(call)
    if call.g.requires_grad and call.g.stride(0) == 0 and call.q.element_size() == 2:
        reasons.append("gradients of slopes (they add up over all tokens what one rounding of a state to 16 bits costs)")
    return reasons


def _too_long(call: ScalarDecayCall) -> list[str]:
    pairs = call.longest**2
    return [f"{pairs} pairs of tokens; it writes them all down and stops at {MAX_PAIRS}"] if pairs > MAX_PAIRS else []


BACKENDS: tuple[Backend[ScalarDecayCall], ...] = (
    Backend("triton", _triton, _triton_refuses, triton_avoids),
    Backend("torch", _torch, lambda call: []),
    Backend("reference", parallel, _too_long, avoids=only_when_named),
)
