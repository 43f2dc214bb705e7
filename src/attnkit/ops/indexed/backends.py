"""The implementations of the indexed operators: attention's own on sorted rows, and the definition."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit._core.dispatch import Backend, only_when_named
from attnkit.ops.attention.backends import BACKENDS as ATTENTION
from attnkit.ops.attention.call import AttentionCall
from attnkit.ops.attention.reference import MAX_PAIRS
from attnkit.ops.indexed.call import IndexedCall
from attnkit.ops.indexed.reference import reference
from attnkit.ops.indexed.rows import order_rows, packed_call, scatter
from attnkit.ops.merge import merge_partials

__all__ = ["BACKENDS"]

Result = tuple[Tensor, Tensor | None]


def _on_sorted_rows(backend: Backend[AttentionCall]) -> Callable[[IndexedCall], Result]:
    def run_round(call: IndexedCall, index: int) -> tuple[Tensor, Tensor]:
        order = order_rows(call, index)
        out, lse = backend.run(packed_call(call.base, order))
        shape = call.base.q.shape[:3]
        return scatter(out[:, 0], order.queries).unflatten(0, shape), scatter(lse[:, 0], order.queries).unflatten(0, shape)

    def run(call: IndexedCall) -> Result:
        if call.rounds == 1:
            return run_round(call, 0)
        dtype = call.base.q.dtype
        wide = replace(call, base=replace(call.base, return_lse=True, out_dtype=accumulator_dtype(dtype)))
        outs, lses = zip(*(run_round(wide, index) for index in range(call.rounds)), strict=True)
        out, lse = merge_partials(torch.stack(outs), torch.stack(lses))
        return out.to(dtype), lse

    return run


def _sorted(name: str) -> Backend[IndexedCall]:
    backend = next(one for one in ATTENTION if one.name == name)
    return Backend(
        name, _on_sorted_rows(backend), lambda call: backend.refuses(call.base), avoids=lambda call: backend.avoids(call.base)
    )


def _reference_refuses(call: IndexedCall) -> list[str]:
    pairs = call.base.q.shape[1] * call.base.k.shape[1]
    return [f"{pairs} scores a head; it writes them all down and stops at {MAX_PAIRS}"] if pairs > MAX_PAIRS else []


BACKENDS: tuple[Backend[IndexedCall], ...] = (
    _sorted("triton"),
    _sorted("torch"),
    Backend("reference", reference, _reference_refuses, avoids=only_when_named),
)
