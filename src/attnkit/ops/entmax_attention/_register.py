"""The private torch operators behind `entmax_attention`.

Any backend is a pair of functions on batched inputs (packed sequences are a batch of one), registered by `register`:
forward(inputs, keep) -> (out, tau, O2 or None, tiles or None) and backward(inputs, d_out, None, out, tau, O2, tiles, False) ->
gradients of q, k, v, alphas and nothing, where inputs = (q, k, v, alphas, key_bias, cu_seqlens_q, cu_seqlens_k, None, scale,
left, right, softcap, alpha, n_refine, learned). `alphas` [H] in the accumulation dtype stands for `alpha` where it is given,
and `learned` says whether its gradient is wanted (else kernels give zeros); `tiles` are the lists of the tiles of keys that the
kernels' forward pass found in the support.
"""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit._core.devices import current
from attnkit.ops.attention._register import Interface, register
from attnkit.ops.attention.problem import Problem
from attnkit.ops.entmax_attention import blockwise

__all__ = ["problem", "run_blockwise", "run_triton"]

Results = tuple[Tensor | None, ...]
_NORMS = {1.5: "entmax15", 2.0: "sparsemax"}


def problem(inputs: tuple[Any, ...]) -> tuple[Problem, Tensor | None, float]:
    """The tiles, alphas and alpha of batched inputs."""
    q, k, v, alphas, *rest = inputs
    masks, (alpha, *_) = rest[:-3], rest[-3:]
    return Problem.of(q, k, v, None, *masks, block_q=blockwise.BLOCK_Q), alphas, alpha


def _forward(inputs: tuple[Any, ...], keep: bool) -> Results:
    return *blockwise.forward(*problem(inputs), keep), None


def _backward(
    inputs: tuple[Any, ...], d_out: Tensor, d_tau: None, out: Tensor, tau: Tensor, second: Tensor, tiles: None, need_bias: bool
) -> tuple[Tensor, ...]:
    grads = blockwise.backward(*problem(inputs), d_out, tau, second)
    return (*grads, d_out.new_empty(0))


def _launch(inputs: tuple[Any, ...]) -> Any:
    from attnkit.ops._attention_core._triton.launch import Launch  # Triton is optional

    q, k, v, alphas, key_bias, cu_q, cu_k, q_pos, scale, left, right, softcap, alpha, n_refine, _ = inputs
    norm = _NORMS.get(alpha, "entmax")
    gaps = None
    if alphas is not None:
        gaps = (alphas - 1).contiguous()
    elif norm == "entmax":
        gaps = torch.full((q.shape[2],), alpha - 1, device=q.device)
    return Launch(
        q, k, v, None, key_bias, cu_q, cu_k, q_pos, scale, left, right, softcap, "off", norm=norm, gaps=gaps, n_refine=n_refine
    )


def _triton_forward(inputs: tuple[Any, ...], keep: bool) -> Results:
    from attnkit.ops._attention_core._triton import launch

    with current(inputs[0].device):
        p = _launch(inputs)
        results = launch.forward(p, inputs[0].dtype, keep)
    return *results, p.tiles if keep else None


def _triton_backward(
    inputs: tuple[Any, ...],
    d_out: Tensor,
    d_tau: None,
    out: Tensor,
    tau: Tensor,
    second: Tensor,
    tiles: Tensor | None,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    from attnkit.ops._attention_core._triton import launch

    alphas, learned = inputs[3], inputs[-1]
    with current(d_out.device):
        p = _launch(inputs)
        p.tiles = tiles
        if learned:
            p.slopes = tau.new_empty(p.batch, p.heads, p.num_q)
        d_q, d_k, d_v, *_ = launch.backward(p, d_out, None, second, tau, None, False)
        if p.slopes is not None:
            d_alphas = p.slopes.sum((0, 2))
        else:
            d_alphas = d_out.new_empty(0) if alphas is None else torch.zeros_like(alphas)
    return d_q, d_k, d_v, d_alphas, d_out.new_empty(0)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    tau = q.new_empty(q.shape[:-1], dtype=accumulator_dtype(q.dtype))
    return out, tau, torch.empty_like(out) if args[-1] else out.new_empty(0), out.new_empty(0)


def _triton_forward_fake(q: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from attnkit.ops._attention_core._triton import launch

    results = _forward_fake(q, *args)
    shape = launch.lists_shape(_launch((q, *args[:-1]))) if args[-1] and q.dim() == 4 and q.numel() else None
    return results if shape is None else (*results[:3], q.new_empty(shape, dtype=torch.int32))


_OPTIONS = "float scale, int left, int right, float softcap, float alpha, int n_refine, bool learned"
run_blockwise = register("entmax_attention", _forward, _backward, Interface("alphas", _OPTIONS, "bool keep", _forward_fake, 2))
run_triton = register(
    "entmax_attention_triton",
    _triton_forward,
    _triton_backward,
    Interface("alphas", _OPTIONS, "bool keep", _triton_forward_fake, 2),
)
