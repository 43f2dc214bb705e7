"""The implementations of query moments, in order of preference, each with its reasons to refuse a call."""

from collections.abc import Callable

from torch import Tensor

from attnkit._core.dispatch import Backend, only_when_named
from attnkit._core.triton.refusals import kernels_avoid, kernels_refuse
from attnkit.ops.query_moments._register import run_torch, run_triton
from attnkit.ops.query_moments.call import MomentsCall
from attnkit.ops.query_moments.reference import reference

__all__ = ["BACKENDS"]

WIDEST = 256  # of a head in the kernels
Moments = tuple[Tensor, Tensor, Tensor]


def _triton_refuses(call: MomentsCall) -> list[str]:
    width = call.q.shape[3]
    own = [f"heads of width {width} (the kernels take up to {WIDEST})"] if width > WIDEST else []
    return kernels_refuse(call.q.device, call.q.dtype, *own)


def _triton_avoids(call: MomentsCall) -> list[str]:
    return kernels_avoid(call.q.device)


def _through(operator: Callable[..., Moments]) -> Callable[[MomentsCall], Moments]:
    def run(call: MomentsCall) -> Moments:
        return operator(call.q, call.inv_freq, call.positions, call.interleaved, call.real, call.skip, call.shift)

    return run


BACKENDS: tuple[Backend[MomentsCall], ...] = (
    Backend("triton", _through(run_triton), _triton_refuses, _triton_avoids),
    Backend("torch", _through(run_torch), lambda call: []),
    Backend("reference", reference, lambda call: [], avoids=only_when_named),
)
