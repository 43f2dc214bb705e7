"""Attention by its definition: the whole score matrix, an explicit mask, a plain softmax."""

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit.ops.attention.call import AttentionCall, CoreCall

__all__ = ["MAX_PAIRS", "dense_scores", "reference", "reference_refuses"]

MAX_PAIRS = 4096 * 4096


def reference(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The defining formula, differentiable by autograd, in the call's dtype.

    In 16 bits this is the naive form that error budgets refer to: scores and softmax in float32, probabilities cast to
    the input dtype, products summed in float32, one rounding at the end. In float64 it is the oracle.
    """
    packed = call.cu_seqlens_q is not None
    acc = accumulator_dtype(call.q.dtype)
    scores, values = dense_scores(call)
    if call.sinks is not None:  # a sink is one more key whose value is zero
        sink = call.sinks.to(acc)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    empty = torch.isneginf(scores).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)  # keeps the gradient of rows that see nothing finite
    lse = torch.logsumexp(scores, -1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
    prob = torch.exp(scores - lse).masked_fill(empty, 0)[..., : values.shape[-2]]
    out = prob.to(call.q.dtype).to(acc) @ values
    out, lse = out.transpose(1, 2).to(call.out_dtype), lse.masked_fill(empty, -torch.inf)[..., 0].transpose(1, 2)
    return (out[0], lse[0]) if packed else (out, lse)


def reference_refuses(call: CoreCall) -> list[str]:
    """What is too long to be written down, here and by other operators on the core."""
    pairs = call.q.shape[-3] * call.k.shape[-3]
    return [f"{pairs} scores a head; it writes them all down and stops at {MAX_PAIRS}"] if pairs > MAX_PAIRS else []


def dense_scores(call: CoreCall) -> tuple[Tensor, Tensor]:
    """Scores [B, H, T, S], -inf where a row does not see a key, and values [B, H, S, Dv], in the accumulation dtype.

    Values that nobody sees are 0, so that they may hold anything. Packed sequences are a batch of one.
    """
    packed = call.cu_seqlens_q is not None
    acc = accumulator_dtype(call.q.dtype)
    q, k, v = (t[None] if packed else t for t in (call.q, call.k, call.v))
    group = q.shape[2] // k.shape[2]
    seen = _seen(call).to(q.device)
    seen = seen[:, None] if seen.dim() == 3 else seen  # [T, S] or [B, 1, T, S]
    bias = None
    if call.key_bias is not None:
        bias = call.key_bias[None] if packed else call.key_bias
        bias = bias[..., None] if bias.dim() == 2 else bias  # [B, S, 1 or Hkv]
        bias = bias.transpose(1, 2).to(acc).repeat_interleave(group if bias.shape[2] > 1 else 1, 1)[:, :, None]
        seen = seen & ~torch.isneginf(bias)
    unused = ~seen.any(-2, keepdim=True).transpose(-1, -2)  # a key nobody sees may hold anything
    queries, keys, values = (t.transpose(1, 2).to(acc) for t in (q, k, v))  # [B, heads, rows, width]
    keys, values = (t.repeat_interleave(group, 1).masked_fill(unused, 0) for t in (keys, values))
    scores = queries @ keys.transpose(-1, -2) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if bias is not None:
        scores = scores + bias.masked_fill(torch.isneginf(bias), 0)
    return scores.masked_fill(~seen, -torch.inf), values


def _seen(call: CoreCall) -> Tensor:
    """[T, S] or [B, T, S] bool, written from the definition and not from a Plan."""
    num_q, num_k = call.q.shape[-3], call.k.shape[-3]
    key = torch.arange(num_k)
    same = torch.ones(num_q, num_k, dtype=torch.bool)
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        pos = torch.zeros(num_q, dtype=torch.long)
        same = torch.zeros(num_q, num_k, dtype=torch.bool)
        cu_q, cu_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
        for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
            pos[q0:q1] = torch.arange(q1 - q0) + k1 - (q1 - q0)
            same[q0:q1, k0:k1] = True
    else:
        pos = torch.arange(num_q) + num_k - num_q
    if call.q_pos is not None:
        pos = call.q_pos.cpu().long()
    offset = key - pos[..., None]
    if call.left >= 0:
        same = same & (offset >= -call.left)
    if call.right >= 0:
        same = same & (offset <= call.right)
    return same
