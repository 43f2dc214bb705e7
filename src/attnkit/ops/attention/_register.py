"""The private torch operators behind `attention` and `query_sparse_attention`: schema, fake, autograd, implementations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnkit._core.checks import accumulator_dtype
from attnkit._core.devices import current
from attnkit._core.library import define, define_gradient
from attnkit.ops._attention_core.plan import Plan
from attnkit.ops.attention import blockwise, flash4
from attnkit.ops.attention.problem import Problem

__all__ = ["run_blockwise", "run_fa4", "run_triton"]

Results = tuple[Tensor, ...]
Forward = tuple[Tensor, Tensor, Tensor | None]  # out, lse, and what rounding took from out


def _blockwise_problem(
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
    stable: str,
) -> Problem:
    block = blockwise.BLOCK_Q
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        sizes = (q.shape[1], k.shape[1])
        plan = Plan.varlen(cu_seqlens_q, cu_seqlens_k, *sizes, left, right, q_pos=q_pos, block_q=block)
    elif q_pos is not None:
        plan = Plan.rows(q_pos, k.shape[1], left, right, block_q=block)
    else:
        plan = Plan.window(q.shape[1], k.shape[1], left, right, block_q=block, device=q.device)
    return Problem(q, k, v, sinks, key_bias, plan, scale, softcap, stable)


def _blockwise_forward(inputs: tuple[Any, ...], out_dtype: torch.dtype) -> Forward:
    return blockwise.forward(_blockwise_problem(*inputs), out_dtype)


def _blockwise_backward(inputs: tuple[Any, ...], *results: Any) -> Results:
    return blockwise.backward(_blockwise_problem(*inputs), *results)


def _triton_forward(inputs: tuple[Any, ...], out_dtype: torch.dtype) -> Forward:
    from attnkit.ops._attention_core._triton import launch  # Triton loads when a kernel runs

    with current(inputs[0].device):  # Triton launches on the current device, wherever tensors are
        return launch.forward(launch.Launch(*inputs), out_dtype)


def _triton_backward(inputs: tuple[Any, ...], *results: Any) -> Results:
    from attnkit.ops._attention_core._triton import launch

    with current(inputs[0].device):
        return launch.backward(launch.Launch(*inputs), *results)


def _batched(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_bias: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    """Packed sequences as a batch of one."""
    if q.dim() == 3:
        q, k, v, key_bias = q[None], k[None], v[None], None if key_bias is None else key_bias[None]
    return (q, k, v, sinks, key_bias, *rest)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.options = inputs[8:13]


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, stable, out_dtype = args
    out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=out_dtype)
    rest = torch.empty_like(out) if stable == "delta" and out_dtype.itemsize == 2 else out.new_empty(0)
    return out, q.new_empty(q.shape[:-1], dtype=accumulator_dtype(q.dtype)), rest


def _backward_fake(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, rest: Tensor, need_bias: bool,
    q: Tensor, k: Tensor, v: Tensor, *inputs: Any,
) -> Results:  # fmt: skip
    sinks, key_bias = inputs[:2]
    d_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    d_key_bias = key_bias.new_empty(key_bias.shape) if need_bias and key_bias is not None else q.new_empty(0)
    return (*(t.new_empty(t.shape) for t in (q, k, v)), d_sinks, d_key_bias)


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? key_bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? q_pos, float scale, int left, int right, float softcap, str stable"
)
_RESULTS = "Tensor d_out, Tensor d_lse, Tensor out, Tensor lse, Tensor rest, bool need_bias"
_GRADS = ", ".join(["Tensor"] * 5)


def _plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether nobody watches: no tracer, no dispatch mode, no tensor subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return all(t is None or type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors)


def _direct(run: Callable[..., Forward], gradient: Callable[..., tuple[Tensor | None, ...]]) -> Any:
    """The autograd function of plain calls."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
            output = run(*args)
            _save(ctx, args, output)
            ctx.set_materialize_grads(False)  # nobody may ask for the gradient of the LSE
            return output[:2]

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
            if d_out is None:
                d_out = torch.zeros_like(ctx.saved_tensors[-3])
            return gradient(ctx, d_out, d_lse)

    return Direct


def _traced(run: Callable[..., Forward], run_backward: Callable[..., Results]) -> tuple[Callable[..., Results], ...]:
    """Both passes with the operators' schemas, which know no tensor that may be absent among results: an empty one does."""

    def forward(q: Tensor, *args: Any) -> Results:
        out, lse, rest = run(q, *args)
        return out, lse.contiguous(), out.new_empty(0) if rest is None else rest

    def backward(
        d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, rest: Tensor, need_bias: bool, *inputs: Any
    ) -> Results:
        return run_backward(d_out, d_lse, out, lse, rest if rest.numel() else None, need_bias, *inputs)

    return forward, backward


def _register(name: str, forward: Callable[..., Forward], backward: Callable[..., Results]) -> Callable[..., Any]:
    """Define `attnkit::NAME` and its backward operator from implementations on batched inputs, and return what to call.

    A call on plain tensors goes to the implementation through an autograd function of its own: the two operators and what
    torch.library wraps around them cost as much as launching the kernels. Whoever traces or watches sees the operators.
    """

    def run(q: Tensor, *args: Any) -> Forward:
        *inputs, out_dtype = args
        out, lse, rest = forward(_batched(q, *inputs), out_dtype)
        if q.dim() == 4:
            return out, lse, rest
        return out[0], lse[0], None if rest is None else rest[0]

    def run_backward(
        d_out: Tensor,
        d_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        rest: Tensor | None,
        need_bias: bool,
        q: Tensor,
        *inputs: Any,
    ) -> Results:
        packed = q.dim() == 3
        results = (t[None] if packed and t is not None else t for t in (d_out, d_lse, out, lse, rest))
        grads = backward(_batched(q, *inputs), *results, need_bias)
        if not packed:
            return grads
        d_q, d_k, d_v, d_sinks, d_key_bias = grads
        return d_q[0], d_k[0], d_v[0], d_sinks, d_key_bias[0] if d_key_bias.dim() > 1 else d_key_bias

    def gradient(ctx: Any, through: Callable[..., Results], d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse, rest = ctx.saved_tensors
        need_bias = tensors[4] is not None and ctx.needs_input_grad[4]
        grads = through(d_out, d_lse, out, lse, rest, need_bias, *tensors, *ctx.options)
        d_sinks = None if tensors[3] is None else grads[3]
        d_key_bias = grads[4] if need_bias else None
        return (*grads[:3], d_sinks, d_key_bias, *[None] * 9)

    forward_traced, backward_traced = _traced(run, run_backward)
    operator = define(f"{name}({_INPUTS}, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)", forward_traced, _forward_fake)
    backward_op = define(f"{name}_backward({_RESULTS}, {_INPUTS}) -> ({_GRADS})", backward_traced, _backward_fake)
    direct = _direct(run, lambda ctx, d_out, d_lse: gradient(ctx, run_backward, d_out, d_lse))
    define_gradient(name, _save, lambda ctx, d_out, d_lse, _: gradient(ctx, backward_op, d_out, d_lse))

    def call(*args: Any) -> Any:
        if not _plain(args[:8]):
            return operator(*args)[:2]
        return direct.apply(*args) if torch.is_grad_enabled() else run(*args)[:2]

    return call


run_blockwise = _register("attention", _blockwise_forward, _blockwise_backward)
run_triton = _register("attention_triton", _triton_forward, _triton_backward)
run_fa4 = _register("attention_fa4", flash4.forward, flash4.backward)
