"""The private torch operators behind the recurrences: `attnkit::chunkwise` and `attnkit::gate_scan`, each with its gradient.

Another implementation (kernels) is a pair of functions like `_forward` and `_backward`, registered by `register` under another
name with the same schema; it takes a table of chunks and hands back what `passes` says.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit._core.devices import current
from attnkit._core.library import define, define_gradient
from attnkit.ops._chunkwise_core import gates, passes
from attnkit.ops._chunkwise_core.layout import ChunkLayout

__all__ = ["layout_of", "register", "run_chunkwise", "run_chunkwise_triton", "run_gate_scan", "run_gate_scan_triton"]

Results = tuple[Tensor, ...]
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? gain, Tensor? m, Tensor? S, Tensor? n, Tensor? cu_seqlens, "
    "bool normalize, float scale, float eps, int chunk_size"
)
_TENSORS = 9


def layout_of(x: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> ChunkLayout:
    """The chunks of [B, T, ...], or of packed [R, ...]."""
    if cu_seqlens is None:
        return ChunkLayout.batched(x.shape[0], x.shape[1], chunk_size, x.device)
    return ChunkLayout.packed(cu_seqlens, x.shape[0], chunk_size)


def _rows(x: Any, cu_seqlens: Tensor | None) -> Any:
    """[B, T, ...] as rows [B T, ...]; packed ones are rows already."""
    return x if x is None or cu_seqlens is not None else x.flatten(0, 1)


def _problem(inputs: tuple[Any, ...]) -> passes.Problem:
    q, k, v, decay, gain, m, S, n, cu_seqlens, normalize, scale, eps, chunk_size = inputs
    layout = layout_of(q, cu_seqlens, chunk_size).trimmed()
    acc, shape = accumulator_dtype(q.dtype), (layout.num_seqs, k.shape[-2], k.shape[-1])
    if S is None:
        S = q.new_zeros(*shape, v.shape[-1], dtype=acc)
    if normalize and n is None:
        n = q.new_zeros(shape, dtype=acc)
    q, k, v, decay, gain, m = (_rows(x, cu_seqlens) for x in (q, k, v, decay, gain, m))
    return passes.Problem(layout, q, k, v, decay, gain, m, S, n if normalize else None, scale, eps)


def _forward(inputs: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    return passes.forward(_problem(inputs))


def _backward(
    inputs: tuple[Any, ...], den: Tensor | None, d_out: Tensor, d_S: Tensor | None, d_n: Tensor | None, gates: bool
) -> passes.Gradients:
    del gates  # that of gates is computed beside the others
    p = _problem(inputs)
    return passes.backward(p, _rows(den, inputs[8]), _rows(d_out, inputs[8]), d_S, d_n)


def _triton_forward(inputs: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    from attnkit.ops._chunkwise_core._triton import launch  # Triton loads when a kernel runs

    with current(inputs[0].device):
        return launch.forward(inputs)


def _triton_backward(inputs: tuple[Any, ...], *results: Any) -> passes.Gradients:
    from attnkit.ops._chunkwise_core._triton import launch

    with current(inputs[0].device):
        return launch.backward(inputs, *results)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Results:
    cu_seqlens, normalize = rest[5], rest[6]
    acc, num_seqs = accumulator_dtype(q.dtype), q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    S = q.new_empty(num_seqs, k.shape[-2], k.shape[-1], v.shape[-1], dtype=acc)
    if not normalize:
        return out, q.new_empty(0, dtype=acc), S, q.new_empty(0, dtype=acc)
    return out, q.new_empty(q.shape[:-1], dtype=acc), S, q.new_empty(num_seqs, *k.shape[-2:], dtype=acc)


def _backward_fake(den: Tensor, d_out: Tensor, d_S: Any, d_n: Any, gates: bool, *inputs: Any) -> Results:
    q, k, v, decay, gain, m, *_ = inputs
    _, _, S, n = _forward_fake(*inputs)
    there = (decay, gain, m if inputs[9] else None)
    of_gates = (decay.new_empty(0 if t is None or not gates else decay.shape) for t in there)
    return (*(t.new_empty(t.shape) for t in (q, k, v)), *of_gates, S, n)


def register(
    name: str, forward: Callable[..., tuple[Tensor | None, ...]], backward: Callable[..., passes.Gradients]
) -> Callable[..., Results]:
    """Define `attnkit::NAME` and its backward operator, and return what to call.

    (q, k, v, decay, gain, m, S, n, cu_seqlens, normalize, scale, eps, chunk_size) -> out, the sums that denominators are
    made of, and the state's two parts; empty tensors stand for what is not there. `backward` is told last whether anybody
    wants the gradients of decay, gain and m, and may leave them out.
    """

    def run(*inputs: Any) -> Results:
        q, acc = inputs[0], accumulator_dtype(inputs[0].dtype)
        out, den, S, n = forward(inputs)
        assert out is not None
        assert S is not None
        shaped = out.view(*q.shape[:-1], inputs[2].shape[-1]), None if den is None else den.view(q.shape[:-1]), S, n
        return tuple(q.new_empty(0, dtype=acc) if t is None else t for t in shaped)

    def run_backward(den: Tensor, d_out: Tensor, d_S: Tensor | None, d_n: Tensor | None, gates: bool, *inputs: Any) -> Results:
        q, k, v, decay, gain, m, *_ = inputs
        g = backward(inputs, den if inputs[9] else None, d_out, d_S, d_n, gates)
        of_gates = (g.decay, None if gain is None else g.gain, None if m is None else g.m)
        shaped = (decay.new_empty(0) if t is None or not gates else t.view(decay.shape) for t in of_gates)
        d_n0 = decay.new_empty(0) if g.n is None else g.n
        return g.q.view(q.shape), g.k.view(k.shape), g.v.view(v.shape), *shaped, g.S, d_n0

    operator = define(f"{name}({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", run, _forward_fake)
    results = ", ".join(["Tensor"] * 8)
    schema = f"{name}_backward(Tensor den, Tensor d_out, Tensor? d_S, Tensor? d_n, bool gates, {_INPUTS}) -> ({results})"
    backward_op = define(schema, run_backward, _backward_fake)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        ctx.save_for_backward(*inputs[:_TENSORS], output[1])
        ctx.options, ctx.out_shape, ctx.out_dtype = inputs[_TENSORS:], output[0].shape, output[0].dtype
        ctx.set_materialize_grads(False)  # nobody may ask for the gradient of a state

    def gradient(ctx: Any, d_out: Tensor | None, _: Tensor | None, d_S: Tensor | None, d_n: Tensor | None) -> Any:
        *tensors, den = ctx.saved_tensors
        if d_out is None:
            d_out = tensors[0].new_zeros(ctx.out_shape, dtype=ctx.out_dtype)
        gates = any(ctx.needs_input_grad[3:6])
        found = backward_op(den, d_out, d_S, d_n if ctx.options[0] else None, gates, *tensors, *ctx.options)
        here = [t is not None for t in tensors]
        wanted = (
            *here[:3],
            gates,
            here[4] and gates,
            here[5] and gates and ctx.options[0],
            here[6],
            here[7] and ctx.options[0],
        )
        return (*(grad if want else None for grad, want in zip(found, wanted, strict=True)), *[None] * 5)

    define_gradient(name, save, gradient)
    return operator


run_chunkwise = register("chunkwise", _forward, _backward)
run_chunkwise_triton = register("chunkwise_triton", _triton_forward, _triton_backward)

_GATES = "Tensor log_f, Tensor i, Tensor? m0, Tensor? cu_seqlens, int chunk_size"


def _scan(log_f: Tensor, i: Tensor, m0: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int) -> Results:
    layout = layout_of(i, cu_seqlens, chunk_size).trimmed()
    *rows, m_last, source = gates.forward(layout, _rows(log_f, cu_seqlens), _rows(i, cu_seqlens), m0)
    return *(t.view(i.shape) for t in rows), m_last, source.view(i.shape)


def _scan_triton(*inputs: Any) -> Results:
    from attnkit.ops._chunkwise_core._triton import scan

    with current(inputs[1].device):
        return scan.forward(*inputs)


def _scan_triton_backward(*inputs: Any) -> Results:
    from attnkit.ops._chunkwise_core._triton import scan

    return scan.backward(*inputs)


def _scan_fake(log_f: Tensor, i: Tensor, m0: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int) -> Results:
    num_seqs = i.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = (i.new_empty(i.shape) for _ in range(3))
    return *rows, i.new_empty(num_seqs, i.shape[-1]), i.new_empty(i.shape, dtype=torch.int64)


def _scan_backward(
    d_decay: Tensor, d_gain: Tensor, d_m: Tensor, d_last: Tensor, source: Tensor, cu_seqlens: Tensor | None
) -> Results:
    layout = layout_of(source, cu_seqlens, gates.WHATEVER)
    d_decay, d_gain, d_m, rows = (_rows(t, cu_seqlens) for t in (d_decay, d_gain, d_m, source))
    d_f, d_i, d_m0 = gates.backward(layout, d_decay, d_gain, d_m, d_last, rows)
    return d_f.view(source.shape), d_i.view(source.shape), d_m0


def _scan_save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    ctx.save_for_backward(output[4], inputs[3])
    ctx.has_m0 = inputs[2] is not None


def _register_scan(name: str, forward: Callable[..., Results], backward: Callable[..., Results]) -> Callable[..., Results]:
    """Define `attnkit::NAME` and its backward operator, and return what to call: (log_f, i, m0, cu_seqlens, chunk_size)."""
    operator = define(f"{name}({_GATES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", forward, _scan_fake)
    backward_op = define(
        f"{name}_backward(Tensor d_decay, Tensor d_gain, Tensor d_m, Tensor d_last, Tensor source, Tensor? cu_seqlens) "
        "-> (Tensor, Tensor, Tensor)",
        backward,
        lambda d_decay, d_gain, d_m, d_last, *_: (
            torch.empty_like(d_decay),
            torch.empty_like(d_decay),
            torch.empty_like(d_last),
        ),
    )

    def gradient(ctx: Any, d_decay: Tensor, d_gain: Tensor, d_m: Tensor, d_last: Tensor, _: Any) -> Any:
        source, cu_seqlens = ctx.saved_tensors
        d_f, d_i, d_m0 = backward_op(d_decay, d_gain, d_m, d_last, source, cu_seqlens)
        return d_f, d_i, d_m0 if ctx.has_m0 else None, None, None

    define_gradient(name, _scan_save, gradient)
    return operator


run_gate_scan = _register_scan("gate_scan", _scan, _scan_backward)
run_gate_scan_triton = _register_scan("gate_scan_triton", _scan_triton, _scan_triton_backward)
