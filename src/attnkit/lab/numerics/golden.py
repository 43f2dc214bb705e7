"""The true value: attention in float64, row by row, without a matrix of all scores."""

from typing import Literal, overload

import torch
from torch import Tensor

from attnkit.lab.numerics.problem import heads_last, pose, softmax

__all__ = ["golden_attention"]

_ELEMENTS = 2**21  # scores held at once: 16 MiB


@overload
def golden_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., mask: Tensor | None = ..., scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def golden_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., mask: Tensor | None = ..., scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def golden_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale Q K^T + mask) V in float64, differentiable by autograd.

    Give the inputs as they are stored in the format under test: what storing them has cost is then not counted. With
    `v.abs()` in the place of `v` the result is `sum_j P_ij |V_jd|`, the size of the terms that each element is a sum of;
    `deviation` takes it as `row_scale`.

    Args:
        q: [B, T, H, D], any float dtype.
        k, v: [B, S, Hkv, D] and [B, S, Hkv, Dv], H a multiple of Hkv.
        causal: whether row t sees the keys up to t + S - T only.
        mask: [T, S] or [B, T, S] bool, True where a row may see a key.
        scale: of the scores; None means 1/sqrt(D).
        return_lse: whether to return the log-sum-exp too.
    Returns:
        [B, T, H, Dv] in float64, and [B, T, H] natural if asked for. Rows that see nothing are zero, their LSE is -inf.
    Raises:
        ShapeError, DTypeError, InputError: shapes that do not fit, dtypes that are no floats, NaN or infinities.
    Complexity: O(T S D) time; at most 16 MiB of scores (or one row) at a time.
    """
    problem = pose(q, k, v, causal=causal, mask=mask, scale=scale)
    outs, lses = [], []
    for rows in problem.row_slices(problem.keys, _ELEMENTS):
        keys = slice(0, max(1, problem.reach(rows)))
        scores = problem.q[..., rows, :] @ problem.k[..., keys, :].transpose(-1, -2) * problem.scale
        scores = problem.hide(scores, rows, keys)
        p, total, lse = softmax(scores)
        outs.append(p @ problem.v[..., keys, :] / total)
        lses.append(lse)
    out = heads_last(torch.cat(outs, -2))
    return (out, heads_last(torch.cat(lses, -2))[..., 0]) if return_lse else out
