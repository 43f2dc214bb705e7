"""The private torch operators behind `entmax`: schema, fake, autograd, implementations."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnkit._core.devices import current
from attnkit._core.library import define, define_gradient
from attnkit.ops.entmax import rows

__all__ = ["run_torch", "run_triton"]


def _triton_forward(x: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    from attnkit.ops.entmax._triton import launch  # Triton loads when a kernel runs

    with current(x.device):
        return launch.forward(x, alphas, alpha)


def _triton_backward(
    d_prob: Tensor, prob: Tensor, alphas: Tensor | None, alpha: float, need_alphas: bool
) -> tuple[Tensor, Tensor]:
    from attnkit.ops.entmax._triton import launch

    with current(prob.device):
        return launch.backward(d_prob, prob, alphas, alpha, need_alphas)


def _fake(x: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    d_prob: Tensor, prob: Tensor, alphas: Tensor | None, alpha: float, need_alphas: bool
) -> tuple[Tensor, Tensor]:
    d_alphas = alphas.new_empty(alphas.shape) if need_alphas and alphas is not None else prob.new_empty(0)
    return prob.new_empty(prob.shape), d_alphas


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, alphas, ctx.alpha = inputs
    ctx.save_for_backward(output, alphas)


def _register(name: str, forward: Callable[..., Tensor], backward: Callable[..., Any]) -> Callable[..., Any]:
    inputs = "Tensor? alphas, float alpha"
    operator = define(f"{name}(Tensor x, {inputs}) -> Tensor", forward, _fake)
    schema = f"{name}_backward(Tensor d_prob, Tensor prob, {inputs}, bool need_alphas) -> (Tensor, Tensor)"
    backward_op = define(schema, backward, _backward_fake)

    def gradient(ctx: Any, d_prob: Tensor) -> tuple[Tensor | None, ...]:
        prob, alphas = ctx.saved_tensors
        need_alphas = ctx.needs_input_grad[1]
        d_x, d_alphas = backward_op(d_prob, prob, alphas, ctx.alpha, need_alphas)
        return d_x, d_alphas if need_alphas else None, None

    define_gradient(name, _save, gradient)
    return operator


run_torch = _register("entmax", rows.forward, rows.backward)
run_triton = _register("entmax_triton", _triton_forward, _triton_backward)
