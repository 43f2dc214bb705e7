"""The private torch operator behind the indexed operators: attention of rows that stay where they are.

The kernels find row i of the packed queries at row q_rows[i] of q, counted over [B, T, H], and write its results there; keys
likewise. So nothing is copied, in neither pass.
"""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit._core.devices import current
from attnkit.ops.attention._register import Interface, register

__all__ = ["run_triton"]


def _flat(t: Tensor) -> Tensor:
    """[B, T, H, D] -> [1, B * T * H, 1, D]."""
    return t.flatten(0, 2)[None, :, None]


def _launch(inputs: tuple[Any, ...]) -> Any:
    from attnkit.ops._attention_core._triton.launch import Launch  # Triton is optional

    q, k, v, _, _, cu_q, cu_k, q_pos, q_rows, k_rows, scale, softcap = inputs
    places = {"q_rows": q_rows, "k_rows": k_rows}
    return Launch(_flat(q), _flat(k), _flat(v), None, None, cu_q, cu_k, q_pos, scale, -1, 0, softcap, "off", **places)


def _forward(inputs: tuple[Any, ...], out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from attnkit.ops._attention_core._triton import launch

    q, _, v = inputs[:3]
    with current(q.device):
        out, lse, _ = launch.forward(_launch(inputs), out_dtype)
    return out.view(*q.shape[:3], v.shape[3]), lse.view(q.shape[:3])


def _backward(
    inputs: tuple[Any, ...], d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, need_bias: bool
) -> tuple[Tensor, ...]:
    from attnkit.ops._attention_core._triton import launch

    with current(d_out.device):
        d_lse = None if d_lse is None else _flat(d_lse[..., None])[..., 0]
        lse = _flat(lse[..., None])[..., 0]
        d_q, d_k, d_v, *none = launch.backward(_launch(inputs), _flat(d_out), d_lse, _flat(out), lse, None, need_bias)
    q, k, v = inputs[:3]
    return d_q.view(q.shape), d_k.view(k.shape), d_v.view(v.shape), *none


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=args[-1])
    return out, q.new_empty(q.shape[:-1], dtype=accumulator_dtype(q.dtype))


run_triton = register(
    "indexed_attention_triton",
    _forward,
    _backward,
    Interface("sinks", "float scale, float softcap", "ScalarType out_dtype", _fake, 0, ("q_rows", "k_rows")),
)
