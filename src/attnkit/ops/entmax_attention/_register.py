"""The private torch operators behind `entmax_attention`.

Any backend is a pair of functions on batched inputs (packed sequences are a batch of one), registered by `register`:
forward(inputs, keep) -> (out, tau, O2 or None) and backward(inputs, d_out, None, out, tau, O2, False) -> gradients of q, k,
v, alphas and nothing, where inputs = (q, k, v, alphas, key_bias, cu_seqlens_q, cu_seqlens_k, None, scale, left, right, softcap,
alpha, n_refine). `alphas` [H] in the accumulation dtype stands for `alpha` where it is given.
"""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit._core.devices import current
from attnkit.ops.attention._register import Interface, register
from attnkit.ops.attention.problem import Problem
from attnkit.ops.entmax_attention import blockwise

__all__ = ["ENTMAX", "problem", "run_blockwise", "run_triton"]

_NORMS = {1.5: "entmax15", 2.0: "sparsemax"}


def problem(inputs: tuple[Any, ...]) -> tuple[Problem, Tensor | None, float]:
    """The tiles, alphas and alpha of batched inputs."""
    q, k, v, alphas, *rest = inputs
    masks, (alpha, _) = rest[:-2], rest[-2:]
    return Problem.of(q, k, v, None, *masks, block_q=blockwise.BLOCK_Q), alphas, alpha


def _forward(inputs: tuple[Any, ...], keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    return blockwise.forward(*problem(inputs), keep)


def _backward(
    inputs: tuple[Any, ...],
    d_out: Tensor,
    d_tau: Tensor | None,
    out: Tensor,
    tau: Tensor,
    second: Tensor,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    grads = blockwise.backward(*problem(inputs), d_out, tau, second)
    return (*grads, d_out.new_empty(0))


def _launch(inputs: tuple[Any, ...]) -> Any:
    from attnkit.ops._attention_core._triton.launch import Launch  # Triton is optional

    q, k, v, _, key_bias, cu_q, cu_k, q_pos, scale, left, right, softcap, alpha, _ = inputs
    norm = _NORMS.get(alpha, "entmax")
    gaps = torch.full((q.shape[2],), alpha - 1, device=q.device) if norm == "entmax" else None
    return Launch(q, k, v, None, key_bias, cu_q, cu_k, q_pos, scale, left, right, softcap, "off", norm=norm, gaps=gaps)


def _triton_forward(inputs: tuple[Any, ...], keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    from attnkit.ops._attention_core._triton import launch

    with current(inputs[0].device):
        return launch.forward(_launch(inputs), inputs[0].dtype, keep)


def _triton_backward(
    inputs: tuple[Any, ...],
    d_out: Tensor,
    d_tau: Tensor | None,
    out: Tensor,
    tau: Tensor,
    second: Tensor,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    from attnkit.ops._attention_core._triton import launch

    with current(d_out.device):
        d_q, d_k, d_v, *_ = launch.backward(_launch(inputs), d_out, None, second, tau, None, False)
    return d_q, d_k, d_v, d_out.new_empty(0), d_out.new_empty(0)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    tau = q.new_empty(q.shape[:-1], dtype=accumulator_dtype(q.dtype))
    return out, tau, torch.empty_like(out) if args[-1] else out.new_empty(0)


ENTMAX = Interface(
    "alphas", "float scale, int left, int right, float softcap, float alpha, int n_refine", "bool keep", _forward_fake
)
run_blockwise = register("entmax_attention", _forward, _backward, ENTMAX)
run_triton = register("entmax_attention_triton", _triton_forward, _triton_backward, ENTMAX)
