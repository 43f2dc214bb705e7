"""The implementations of scalar decay, in order of preference, each with its reasons to refuse a call."""

from torch import Tensor

from attnkit._core.dispatch import Backend, only_when_named
from attnkit.ops._chunkwise_core._register import run_chunkwise
from attnkit.ops._chunkwise_core.state import RecurrentState
from attnkit.ops.scalar_decay.call import ScalarDecayCall
from attnkit.ops.scalar_decay.reference import MAX_PAIRS, parallel

__all__ = ["BACKENDS"]


def _torch(call: ScalarDecayCall) -> tuple[Tensor, RecurrentState]:
    S = None if call.state is None else call.state.S
    out, _, S, _ = run_chunkwise(
        call.q, call.k, call.v, call.g, None, None, S, None, call.cu_seqlens, False, call.scale, 0.0, call.chunk_size
    )
    return out, RecurrentState(S)


def _too_long(call: ScalarDecayCall) -> list[str]:
    pairs = call.longest**2
    return [f"{pairs} pairs of tokens; it writes them all down and stops at {MAX_PAIRS}"] if pairs > MAX_PAIRS else []


BACKENDS: tuple[Backend[ScalarDecayCall], ...] = (
    Backend("torch", _torch, lambda call: []),
    Backend("reference", parallel, _too_long, avoids=only_when_named),
)
