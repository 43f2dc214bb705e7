"""Expected attention by its definition, every head and pair written out, and the mixture that the Gaussian stands for."""

import math

import torch
from torch import Tensor

from attnkit.ops.expected_attention.call import ExpectedCall
from attnkit.ops.expected_attention.moments import future_query_moments

__all__ = ["dense_logits", "mixture_logits", "reference", "scores_of"]


def dense_logits(k: Tensor, mean: Tensor, cov: Tensor | None, scale: float) -> Tensor:
    """log E[exp(scale q . k)] [B, S, H] of Gaussian queries; k [B, S, H, D]."""
    logits = scale * (k * mean[:, None]).sum(-1)
    if cov is not None:
        logits = logits + scale**2 / 2 * torch.einsum("bshd,bhde,bshe->bsh", k, cov, k)
    return logits


def mixture_logits(
    k: Tensor,
    mean: Tensor,
    cov: Tensor,
    *,
    inv_freq: Tensor,
    positions: Tensor,
    scale: float,
    attention_factor: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """The same without the assumption that rotated queries are Gaussian: log of the average over positions.

    Args:
        k: [B, S, H, D].
        mean, cov: [B, H, D] and [B, H, D, D], of queries before rotation.
        inv_freq, attention_factor, interleaved: as of `future_query_moments`.
        positions: [P] ints, what is averaged over; with all positions of a horizon nothing is approximated.
    """
    rows = []
    for position in positions.tolist():
        turned = future_query_moments(
            mean, cov, inv_freq=inv_freq, start=position, horizon=1, rope="mean",
            attention_factor=attention_factor, interleaved=interleaved,
        )  # fmt: skip
        rows.append(dense_logits(k, *turned, scale))
    return torch.sub(torch.logsumexp(torch.stack(rows), 0), math.log(len(rows)))


def scores_of(call: ExpectedCall, logits: Tensor) -> Tensor:
    """Scores [B, S, Hkv] from logits [B, S, H]."""
    batch, num_keys, kv_heads = call.k.shape[:3]
    group = logits.shape[2] // kv_heads
    valid = torch.ones(batch, num_keys, kv_heads, dtype=torch.bool, device=logits.device)
    if call.valid is not None:
        valid = valid & call.valid
    sink = valid & (valid.cumsum(1) <= call.sinks)
    scored = valid & ~sink
    hidden = ~scored.repeat_interleave(group, 2)
    alone = hidden.all(1, keepdim=True)
    prob = torch.softmax(logits.masked_fill(hidden, -torch.inf).masked_fill(alone, 0), 1) if num_keys else logits
    values = call.v.to(logits.dtype)
    if call.gram is not None:
        wide = values.repeat_interleave(group, 2)
        norm = torch.einsum("bshd,hde,bshe->bsh", wide, call.gram, wide).clamp(min=0).sqrt()
    elif call.norm == "l2":
        norm = torch.linalg.vector_norm(values, dim=-1).repeat_interleave(group, 2)
    else:
        norm = torch.ones_like(prob)
    scores: Tensor = ((prob + call.eps) * norm).unflatten(2, (kv_heads, group)).mean(3)
    if num_keys:
        top = scores.masked_fill(~scored, 0).amax((1, 2), keepdim=True) + 1
        scores = torch.where(sink, top, scores.masked_fill(~scored, -torch.inf))
    return scores


def reference(call: ExpectedCall) -> Tensor:
    """Scores [B, S, Hkv] in the accumulation dtype."""
    keys = call.k.to(call.mean.dtype).repeat_interleave(call.mean.shape[1] // call.k.shape[2], 2)
    return scores_of(call, dense_logits(keys, call.mean, call.cov, call.scale))
