"""The private torch operators behind `attention` and `query_sparse_attention`: schema, fake, autograd, implementations.

`register` serves every operator on the core: what differs between them is an `Interface`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnkit._core.checks import accumulator_dtype
from attnkit._core.devices import current
from attnkit._core.library import define, define_gradient
from attnkit.ops.attention import blockwise, flash4
from attnkit.ops.attention.problem import Problem

__all__ = ["Interface", "register", "run_blockwise", "run_fa4", "run_triton"]

Results = tuple[Tensor, ...]
Forward = tuple[Any, ...]  # out, lse, and what else the backward pass needs, each a tensor or None


@dataclass(frozen=True)
class Interface:
    """What an operator on the core takes and returns beyond what all of them do.

    All take (q, k, v, PER_HEAD, key_bias, cu_seqlens_q, cu_seqlens_k, q_pos, INDICES, OPTIONS, LAST) and return out, a number
    for each row, and further tensors for the backward pass or None in their place; all have gradients of the first five.

    Attributes:
        per_head: the name of the tensor [H] (None: not given).
        options: declarations of plain options, which the backward pass is given too.
        last: declaration of one that only the forward pass takes.
        fake: the forward pass on shapes.
        kept: how many further tensors there are.
        indices: names of tensors that say where rows are.
    """

    per_head: str
    options: str
    last: str
    fake: Callable[..., Results]
    kept: int = 1
    indices: tuple[str, ...] = ()

    @property
    def tensors(self) -> int:
        """How many of the inputs are tensors; they come first."""
        return 8 + len(self.indices)

    @property
    def inputs(self) -> str:
        """The declarations of all inputs of the backward pass."""
        optional = (self.per_head, "key_bias", "cu_seqlens_q", "cu_seqlens_k", "q_pos", *self.indices)
        return ", ".join(["Tensor q, Tensor k, Tensor v", *(f"Tensor? {name}" for name in optional), self.options])


def _blockwise_forward(inputs: tuple[Any, ...], out_dtype: torch.dtype) -> Forward:
    return blockwise.forward(Problem.of(*inputs, block_q=blockwise.BLOCK_Q), out_dtype)


def _blockwise_backward(inputs: tuple[Any, ...], *results: Any) -> Results:
    return blockwise.backward(Problem.of(*inputs, block_q=blockwise.BLOCK_Q), *results)


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


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, stable, out_dtype = args
    out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=out_dtype)
    rest = torch.empty_like(out) if stable == "delta" and out_dtype.itemsize == 2 else out.new_empty(0)
    return out, q.new_empty(q.shape[:-1], dtype=accumulator_dtype(q.dtype)), rest


def _backward_fake(need_bias: bool, q: Tensor, k: Tensor, v: Tensor, *inputs: Any) -> Results:
    sinks, key_bias = inputs[:2]
    d_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    d_key_bias = key_bias.new_empty(key_bias.shape) if need_bias and key_bias is not None else q.new_empty(0)
    return (*(t.new_empty(t.shape) for t in (q, k, v)), d_sinks, d_key_bias)


SOFTMAX = Interface(
    "sinks", "float scale, int left, int right, float softcap, str stable", "ScalarType out_dtype", _forward_fake
)
_GRADS = ", ".join(["Tensor"] * 5)


def _plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether nobody watches: no tracer, no dispatch mode, no tensor subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return all(t is None or type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors)


def _direct(run: Callable[..., Forward], save: Callable[..., None], gradient: Callable[..., tuple[Tensor | None, ...]]) -> Any:
    """The autograd function of plain calls."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
            output = run(*args)
            save(ctx, args, output)
            ctx.set_materialize_grads(False)  # nobody may ask for the gradient of the LSE
            return output[:2]

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
            return gradient(ctx, d_out, d_lse)

    return Direct


def _split(args: tuple[Any, ...], kept: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the backward pass gets: (d_out, d_lse, out, lse, *kept), and (need_bias, q, ...)."""
    return args[: 4 + kept], args[4 + kept :]


def _traced(run: Callable[..., Forward], run_backward: Callable[..., Results], kept: int) -> tuple[Callable[..., Results], ...]:
    """Both passes with the operators' schemas, which know no tensor that may be absent among results: an empty one does."""

    def forward(q: Tensor, *args: Any) -> Results:
        out, lse, *others = run(q, *args)
        return out, lse.contiguous(), *(out.new_empty(0) if t is None else t for t in others)

    def backward(*args: Any) -> Results:
        (d_out, d_lse, out, lse, *others), rest = _split(args, kept)
        return run_backward(d_out, d_lse, out, lse, *(t if t.numel() else None for t in others), *rest)

    return forward, backward


def register(
    name: str, forward: Callable[..., Forward], backward: Callable[..., Results], interface: Interface = SOFTMAX
) -> Callable[..., Any]:
    """Define `attnkit::NAME` and its backward operator from implementations on batched inputs, and return what to call.

    A call on plain tensors goes to the implementation through an autograd function of its own: the two operators and what
    torch.library wraps around them cost as much as launching the kernels. Whoever traces or watches sees the operators.
    """

    kept, tensors = interface.kept, interface.tensors

    def save(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
        ctx.save_for_backward(*inputs[:tensors], *output)
        ctx.options = inputs[tensors:-1]  # the last is for the forward pass alone

    def run(q: Tensor, *args: Any) -> Forward:
        *inputs, last = args
        results = forward(_batched(q, *inputs), last)
        return results if q.dim() == 4 else tuple(None if t is None else t[0] for t in results)

    def run_backward(*args: Any) -> Results:
        results, (need_bias, q, *inputs) = _split(args, kept)
        packed = q.dim() == 3
        results = tuple(t[None] if packed and t is not None else t for t in results)
        grads = backward(_batched(q, *inputs), *results, need_bias)
        if not packed:
            return grads
        d_q, d_k, d_v, d_sinks, d_key_bias = grads
        return d_q[0], d_k[0], d_v[0], d_sinks, d_key_bias[0] if d_key_bias.dim() > 1 else d_key_bias

    def gradient(
        ctx: Any, through: Callable[..., Results], d_out: Tensor | None, d_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: gradient checkpointing computes them when they are asked for
        inputs, results = saved[:tensors], saved[tensors:]
        d_out = torch.zeros_like(results[0]) if d_out is None else d_out
        need_bias = inputs[4] is not None and ctx.needs_input_grad[4]
        grads = through(d_out, d_lse, *results, need_bias, *inputs, *ctx.options)
        d_sinks = None if inputs[3] is None else grads[3]
        d_key_bias = grads[4] if need_bias else None
        return (*grads[:3], d_sinks, d_key_bias, *[None] * (tensors - 4 + len(ctx.options)))

    forward_traced, backward_traced = _traced(run, run_backward, kept)
    results = ", ".join(["Tensor"] * (2 + kept))
    operator = define(f"{name}({interface.inputs}, {interface.last}) -> ({results})", forward_traced, interface.fake)
    results = ", ".join(f"Tensor {t}" for t in ("d_out", "d_lse", "out", "lse", *(f"kept{i}" for i in range(kept))))
    schema = f"{name}_backward({results}, bool need_bias, {interface.inputs}) -> ({_GRADS})"
    backward_op = define(schema, backward_traced, lambda *args: _backward_fake(*_split(args, kept)[1]))
    direct = _direct(run, save, lambda ctx, d_out, d_lse: gradient(ctx, run_backward, d_out, d_lse))
    define_gradient(name, save, lambda ctx, d_out, d_lse, *_: gradient(ctx, backward_op, d_out, d_lse))

    def call(*args: Any) -> Any:
        if not _plain(args[:tensors]):
            return operator(*args)[:2]
        return direct.apply(*args) if torch.is_grad_enabled() else run(*args)[:2]

    return call


run_blockwise = register("attention", _blockwise_forward, _blockwise_backward)
run_triton = register("attention_triton", _triton_forward, _triton_backward)
run_fa4 = register("attention_fa4", flash4.forward, flash4.backward)
