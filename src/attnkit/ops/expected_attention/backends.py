"""The implementations of expected attention, in order of preference, each with its reasons to refuse a call."""

from collections.abc import Callable

from torch import Tensor

from attnkit._core.dispatch import Backend, only_when_named
from attnkit._core.triton.refusals import kernels_avoid, kernels_refuse
from attnkit.ops.expected_attention._register import run_torch, run_triton
from attnkit.ops.expected_attention.call import ExpectedCall
from attnkit.ops.expected_attention.reference import reference

__all__ = ["BACKENDS"]

WIDEST = 256  # of a head in the kernels


def _triton_refuses(call: ExpectedCall) -> list[str]:
    widest = max(call.k.shape[3], call.v.shape[3])
    own = [f"heads of width {widest} (the kernels take up to {WIDEST})"] if widest > WIDEST else []
    return kernels_refuse(call.k.device, call.k.dtype, *own)


def _triton_avoids(call: ExpectedCall) -> list[str]:
    return kernels_avoid(call.k.device)


def _through(operator: Callable[..., Tensor]) -> Callable[[ExpectedCall], Tensor]:
    def run(call: ExpectedCall) -> Tensor:
        return operator(call.k, call.v, call.mean, call.cov, call.gram, call.valid, call.scale, call.eps, call.norm, call.sinks)

    return run


BACKENDS: tuple[Backend[ExpectedCall], ...] = (
    Backend("triton", _through(run_triton), _triton_refuses, _triton_avoids),
    Backend("torch", _through(run_torch), lambda call: []),
    Backend("reference", reference, lambda call: [], avoids=only_when_named),
)
