"""The implementations of ragged decode attention, in order of preference, each with its reasons to refuse a call."""

from attnkit._core.dispatch import Backend, only_when_named
from attnkit._core.triton.refusals import kernels_avoid, kernels_refuse
from attnkit.ops.ragged_decode._register import run_torch, run_triton
from attnkit.ops.ragged_decode.call import RaggedCall
from attnkit.ops.ragged_decode.reference import reference, reference_refuses

__all__ = ["BACKENDS"]

_OF_THE_POOL = ("key_scale", "key_zero", "value_scale", "value_zero", "bias")
WIDEST = 256  # a program holds a key whole


def _triton_refuses(call: RaggedCall) -> list[str]:
    pages, own = call.pages, []
    if max(pages.widths) > WIDEST:
        own.append(f"a width of {max(pages.widths)} (the kernels take up to {WIDEST})")
    for name, tensor in pages.tensors().items():
        whole = tensor.stride(-1) == 1 if name in ("keys", "values") else tensor.is_contiguous() or name not in _OF_THE_POOL
        if not whole:
            own.append(f"pages.{name} with strides {tensor.stride()} (copying the pool would cost more than reading it)")
    return kernels_refuse(call.q.device, call.q.dtype, *own)


def _triton_avoids(call: RaggedCall) -> list[str]:
    return kernels_avoid(call.q.device)


BACKENDS: tuple[Backend[RaggedCall], ...] = (
    Backend("triton", run_triton, _triton_refuses, _triton_avoids),
    Backend("torch", run_torch, lambda call: []),
    Backend("reference", reference, reference_refuses, avoids=only_when_named),
)
