"""The private torch operators behind `ragged_decode_attention`: one schema, plain torch and kernels; no gradient."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit._core.devices import current
from attnkit._core.library import define
from attnkit.ops.ragged_decode import blockwise
from attnkit.ops.ragged_decode.call import RaggedCall
from attnkit.ops.ragged_decode.pages import KVPages

__all__ = ["run_torch", "run_triton"]

_INPUTS = (
    "Tensor q, Tensor keys, Tensor values, Tensor table, Tensor lengths, Tensor? tail_keys, Tensor? tail_values, "
    "Tensor? tail_lengths, Tensor? key_scale, Tensor? key_zero, Tensor? value_scale, Tensor? value_zero, Tensor? bias, "
    "Tensor? tail_bias, Tensor? sinks, float scale, float softcap, ScalarType out_dtype"
)
_PARTS = 13  # tensors of pages
Result = tuple[Tensor, Tensor]


def _torch(q: Tensor, *rest: Any) -> Result:
    return blockwise.attend(q, KVPages(*rest[:_PARTS]), *rest[_PARTS:])


def _triton(q: Tensor, *rest: Any) -> Result:
    from attnkit.ops.ragged_decode._triton import launch  # Triton loads when a kernel runs

    with current(q.device):
        return launch.run(q, KVPages(*rest[:_PARTS]), *rest[_PARTS:])


def _fake(q: Tensor, *rest: Any) -> Result:
    out = q.new_empty(*q.shape[:3], KVPages(*rest[:_PARTS]).widths[1], dtype=rest[-1])
    return out, q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))


def _runner(name: str, run: Callable[..., Result]) -> Callable[[RaggedCall], Result]:
    operator = define(f"{name}({_INPUTS}) -> (Tensor, Tensor)", run, _fake)

    def call_it(call: RaggedCall) -> Result:
        p = call.pages
        parts = (
            p.keys, p.values, p.table, p.lengths, p.tail_keys, p.tail_values, p.tail_lengths, p.key_scale, p.key_zero,
            p.value_scale, p.value_zero, p.bias, p.tail_bias,
        )  # fmt: skip
        out, lse = operator(call.q, *parts, call.sinks, call.scale, call.softcap, call.out_dtype)
        return out, lse

    return call_it


run_torch = _runner("ragged_decode_attention", _torch)
run_triton = _runner("ragged_decode_attention_triton", _triton)
