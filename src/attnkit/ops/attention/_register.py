"""The private torch operators behind `attention` and `query_sparse_attention`: schema, fake, autograd."""

from typing import Any

from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit._core.library import define, define_gradient
from attnkit.ops._attention_core.plan import Plan
from attnkit.ops.attention import blockwise
from attnkit.ops.attention.problem import Problem

__all__ = ["attention_op"]


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    key_bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_pos: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> Problem:
    block = blockwise.BLOCK_Q
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        plan = Plan.varlen(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], left, right, block_q=block)
        q, k, v = q[None], k[None], v[None]
        key_bias = None if key_bias is None else key_bias[None]
    elif q_pos is not None:
        plan = Plan.rows(q_pos, k.shape[1], left, right, block_q=block)
    else:
        plan = Plan.window(q.shape[1], k.shape[1], left, right, block_q=block, device=q.device)
    return Problem(q, k, v, sinks, key_bias, plan, scale, softcap)


def _forward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *inputs, out_dtype = args
    out, lse = blockwise.forward(_problem(q, *inputs), out_dtype)
    return (out[0], lse[0]) if q.dim() == 3 else (out, lse)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    shape = q.shape[:-1]
    return q.new_empty(*shape, v.shape[-1], dtype=args[-1]), q.new_empty(shape, dtype=accumulator_dtype(q.dtype))


def _backward(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, need_bias: bool, q: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    packed = q.dim() == 3
    d_out, d_lse, out, lse = (t[None] if packed else t for t in (d_out, d_lse, out, lse))
    grads = blockwise.backward(_problem(q, *inputs), d_out, d_lse, out, lse, need_bias)
    if not packed:
        return grads
    d_q, d_k, d_v, d_sinks, d_key_bias = grads
    return d_q[0], d_k[0], d_v[0], d_sinks, d_key_bias[0] if d_key_bias.dim() > 1 else d_key_bias


def _backward_fake(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, need_bias: bool, q: Tensor, k: Tensor, v: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    sinks, key_bias = inputs[:2]
    d_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    d_key_bias = key_bias.new_empty(key_bias.shape) if need_bias and key_bias is not None else q.new_empty(0)
    return (*(t.new_empty(t.shape) for t in (q, k, v)), d_sinks, d_key_bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.options = inputs[8:12]


def _gradient(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    need_bias = tensors[4] is not None and ctx.needs_input_grad[4]
    grads = _backward_op(d_out, d_lse, out, lse, need_bias, *tensors, *ctx.options)
    d_sinks = None if tensors[3] is None else grads[3]
    d_key_bias = grads[4] if need_bias else None
    return (*grads[:3], d_sinks, d_key_bias, *[None] * 8)


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? key_bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? q_pos, float scale, int left, int right, float softcap"
)
_RESULTS = "Tensor d_out, Tensor d_lse, Tensor out, Tensor lse, bool need_bias"
_GRADS = ", ".join(["Tensor"] * 5)
attention_op = define(f"attention({_INPUTS}, ScalarType out_dtype) -> (Tensor, Tensor)", _forward, _forward_fake)
_backward_op = define(f"attention_backward({_RESULTS}, {_INPUTS}) -> ({_GRADS})", _backward, _backward_fake)
define_gradient("attention", _save, _gradient)
