"""Entmax attention by its definition: the whole score matrix, bisection, one differentiable step."""

from torch import Tensor

from attnkit.ops.attention.reference import dense_scores
from attnkit.ops.entmax.reference import dense_entmax
from attnkit.ops.entmax_attention.call import EntmaxAttentionCall

__all__ = ["reference"]


def reference(call: EntmaxAttentionCall) -> tuple[Tensor, Tensor]:
    """out and tau, differentiable by autograd, in the call's dtype; in 16 bits the naive form that error budgets refer to."""
    scores, values = dense_scores(call)
    prob, tau = dense_entmax(scores, call.alpha if call.alphas is None else call.alphas[:, None, None])
    out = (prob.to(call.q.dtype).to(values.dtype) @ values).to(call.q.dtype)
    out, tau = out.transpose(1, 2), tau.detach()[..., 0].transpose(1, 2)
    return (out[0], tau[0]) if call.cu_seqlens_q is not None else (out, tau)
