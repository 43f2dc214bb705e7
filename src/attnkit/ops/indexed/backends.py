"""The implementations of the indexed operators: attention's own on sorted rows, and the definition."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit._core.dispatch import Backend, only_when_named
from attnkit.ops.attention.backends import BACKENDS as ATTENTION
from attnkit.ops.attention.backends import triton_avoids, triton_refuses
from attnkit.ops.attention.call import AttentionCall
from attnkit.ops.attention.reference import reference_refuses
from attnkit.ops.indexed._register import run_triton
from attnkit.ops.indexed.call import IndexedCall
from attnkit.ops.indexed.reference import reference
from attnkit.ops.indexed.rows import Order, order_rows, packed_call, scatter
from attnkit.ops.merge import merge_partials

__all__ = ["BACKENDS"]

Result = tuple[Tensor, Tensor | None]
_PACKED = next(backend for backend in ATTENTION if backend.name == "torch")


def _in_place(base: AttentionCall, order: Order) -> tuple[Tensor, Tensor]:
    """Kernels that find rows where the order says."""
    q, k, v = (t.contiguous() for t in (base.q, base.k, base.v))  # the same rows in the backward pass
    sequences = (order.cu_q, order.cu_k, order.q_pos, order.queries, order.keys)
    out, lse = run_triton(q, k, v, None, None, *sequences, base.scale, base.softcap, base.out_dtype)
    return out, lse


def _on_copies(base: AttentionCall, order: Order) -> tuple[Tensor, Tensor]:
    """Packed attention on rows in sorted order, whose results are put back."""
    out, lse = _PACKED.run(packed_call(base, order))
    shape = base.q.shape[:3]
    return scatter(out[:, 0], order.queries).unflatten(0, shape), scatter(lse[:, 0], order.queries).unflatten(0, shape)


def _rounds(attend: Callable[[AttentionCall, Order], tuple[Tensor, Tensor]]) -> Callable[[IndexedCall], Result]:
    """All rounds of a call, merged by their LSE."""

    def run(call: IndexedCall) -> Result:
        if call.rounds == 1:
            return attend(call.base, order_rows(call))
        dtype = call.base.q.dtype
        wide = replace(call.base, return_lse=True, out_dtype=accumulator_dtype(dtype))
        outs, lses = zip(*(attend(wide, order_rows(call, index)) for index in range(call.rounds)), strict=True)
        out, lse = merge_partials(torch.stack(outs), torch.stack(lses))
        return out.to(dtype), lse

    return run


BACKENDS: tuple[Backend[IndexedCall], ...] = (
    Backend("triton", _rounds(_in_place), lambda call: triton_refuses(call.base), lambda call: triton_avoids(call.base)),
    Backend("torch", _rounds(_on_copies), lambda call: []),
    Backend("reference", reference, lambda call: reference_refuses(call.base), avoids=only_when_named),
)
