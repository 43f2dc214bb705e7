"""Attention in plain torch, tile by tile: the CPU path that trains, and what serves devices without a kernel.

Forward and backward walk the tiles of a `Plan`; memory beyond the inputs is one tile of scores. Each run of keys gives a
partial result: out, the maximum of its scores and the sum of their exponentials over it, which say more than an LSE (one of
10 in float32 knows the weight of its run to 5e-7 only). A sink is a partial result whose output is zero. Scores,
softmax and sums are kept in the accumulation dtype and rounded once, at the end: probabilities are never rounded, so that of
the stable modes only what is done about the rounded output remains.
"""

import torch
from torch import Tensor

from attnkit.ops.attention import fused_cpu
from attnkit.ops.attention.problem import Problem, Runs

__all__ = ["BLOCK_Q", "backward", "forward"]

Partial = tuple[Tensor, Tensor, Tensor]
BLOCK_Q, BLOCK_K = 256, 512


def forward(p: Problem, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """out [B, T, H, Dv], lse [B, T, H], and what rounding took from out, where `stable` is "delta" and it did.

    Rows that see nothing give 0 and -inf (the sink's logit with sinks).
    """
    if p.stable != "delta" or out_dtype.itemsize != 2:
        return *_forward(p, out_dtype), None
    wide, lse = _forward(p, p.acc)
    out = wide.to(out_dtype)
    return out, lse, (wide - out.to(p.acc)).to(out_dtype)


def _forward(p: Problem, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, num_q, heads, _ = p.q.shape
    out = p.q.new_zeros(batch, num_q, heads, p.v.shape[3], dtype=out_dtype)
    lse = p.q.new_full((batch, num_q, heads), -torch.inf, dtype=p.acc)
    if p.sinks is not None:
        lse = p.sinks.to(p.acc).expand(batch, num_q, heads).contiguous()
    out_view, lse_view = p.grouped(out), p.grouped(lse[..., None])
    fused = fused_cpu.available(p)
    run = fused_cpu.forward_run if fused else _forward_run
    for rows, runs in p.tiles(None if fused else BLOCK_K):
        q = p.queries(rows)
        partial: Partial | None = None
        if p.sinks is not None:
            partial = q.new_zeros(()), lse_view[..., rows, :], q.new_ones(())
        for keys, masked in runs:
            new = run(p, q, rows, keys, masked)
            partial = new if partial is None else _merge(partial, new)
        if runs and partial is not None:
            wide, top, total = partial
            out_view[..., rows, :], lse_view[..., rows, :] = wide.to(out_dtype), top + torch.log(total)
    return out, lse


def backward(
    p: Problem, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor | None, need_bias: bool
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, sinks and key_bias (empty tensors for the last two where absent), probabilities recomputed."""
    if rest is not None:
        out = out.to(p.acc) + rest.to(p.acc)
    elif p.stable == "exact_delta" and out.dtype != p.acc:
        out = _forward(p, p.acc)[0]  # d_out * out is then the sum of p * dp, both unrounded
    d_lse = torch.zeros_like(lse) if d_lse is None else d_lse
    p.keys, p.values = p.keys.contiguous(), p.values.contiguous()  # every tile reads them again
    finite = lse.masked_fill(torch.isneginf(lse), 0)
    d_q = torch.zeros_like(p.q, memory_format=torch.contiguous_format)
    d_keys, d_values = torch.zeros_like(p.keys), torch.zeros_like(p.values)
    d_q_view, lse_view = p.grouped(d_q), p.grouped(finite[..., None])
    d_bias = torch.zeros_like(p.bias) if need_bias and p.bias is not None else None
    available = fused_cpu.available(p)
    fused = available and d_bias is None
    if fused:
        wide_d_out, wide_out = (p.grouped(t) for t in fused_cpu.lse_column(p, d_out, out, d_lse))
    delta = (d_out.to(p.acc) * out.to(p.acc)).sum(-1) - d_lse.to(p.acc)  # [B, T, H]
    d_out_view, delta_view = p.grouped(d_out), p.grouped(delta[..., None])
    for rows, runs in p.tiles(None if fused else BLOCK_K):
        q, row_lse = p.queries(rows), lse_view[..., rows, :]
        if available and not fused:
            row_lse = _row_lse(p, q, rows, runs)  # the forward's LSE is of scores rounded otherwise; large ones would show it
        d_q_tile = torch.zeros_like(q)
        for keys, masked in runs:
            if fused:
                d_o, o = wide_d_out[..., rows, :], wide_out[..., rows, :]
                d_q_run, d_k_run, d_v_run = fused_cpu.backward_run(p, q, rows, keys, masked, d_o, o, row_lse)
            else:
                d_o = d_out_view[..., rows, :].to(p.acc)
                d_s, prob, slope = _score_gradient(p, q, rows, keys, masked, d_o, delta_view[..., rows, :], row_lse)
                if d_bias is not None:
                    d_bias[..., keys] += d_s.sum((2, 3))[:, :, None].sum_to_size(d_bias[..., keys].shape)
                d_s = (d_s if slope is None else d_s * slope).flatten(2, 3)
                d_q_run = (d_s @ p.keys[:, :, keys]).view_as(q)
                d_k_run = d_s.transpose(-1, -2) @ q.flatten(2, 3)
                d_v_run = prob.flatten(2, 3).transpose(-1, -2) @ d_o.flatten(2, 3)
            d_q_tile += d_q_run
            d_keys[:, :, keys] += d_k_run
            d_values[:, :, keys] += d_v_run
        d_q_view[..., rows, :] = (d_q_tile * p.scale).to(d_q.dtype)
    d_sinks, d_key_bias = p.q.new_empty(0), p.q.new_empty(0)
    if p.sinks is not None:  # the sink's probability times (0 - delta), summed over rows
        terms = (torch.exp(p.sinks.to(p.acc) - finite) * delta).flatten(0, 1)
        d_sinks = -terms.t().contiguous().sum(1).to(p.sinks.dtype)  # torch sums more exactly along memory
    if d_bias is not None and p.key_bias is not None:
        d_key_bias = d_bias[:, :, 0].transpose(1, 2).reshape(p.key_bias.shape).to(p.key_bias.dtype)
    d_k, d_v = (t.transpose(1, 2).contiguous().to(p.k.dtype) for t in (d_keys, d_values))
    return d_q, d_k, d_v, d_sinks, d_key_bias


def _forward_run(p: Problem, q: Tensor, rows: slice, keys: slice, masked: bool) -> Partial:
    """Attention of scaled queries [B, Hkv, G, rows, D] over a run of keys: out [..., Dv], maximum and sum [..., 1]."""
    s, _ = p.scores(q, rows, keys, masked)
    top = s.amax(-1, keepdim=True)
    prob = s.sub_(top.masked_fill(torch.isneginf(top), 0)).exp_()  # -inf - (-inf) would be NaN
    total = prob.sum(-1, keepdim=True)
    out = (prob.flatten(2, 3) @ p.values[:, :, keys]).unflatten(2, q.shape[2:4])
    return out.div_(total.masked_fill(total == 0, 1)), top, total


def _merge(a: Partial, b: Partial) -> Partial:
    """Two partial results of the same rows -> one over the union of their keys."""
    top = torch.maximum(a[1], b[1])
    finite = top.masked_fill(torch.isneginf(top), 0)
    mass_a, mass_b = (total * torch.exp(own - finite) for _, own, total in (a, b))
    total = mass_a + mass_b
    share = total.masked_fill(total == 0, 1)
    return a[0] * (mass_a / share) + b[0] * (mass_b / share), top, total


def _row_lse(p: Problem, q: Tensor, rows: slice, runs: Runs) -> Tensor:
    """LSE [..., 1] of the rows from the same matrix products that the backward pass repeats; 0 where nothing is seen."""
    parts = [torch.logsumexp(p.scores(q, rows, keys, masked)[0], -1, keepdim=True) for keys, masked in runs]
    if p.sinks is not None:
        parts.append(p.sinks.to(p.acc).view(p.kv_heads, p.group, 1, 1).expand(*q.shape[:-1], 1))
    lse = torch.logsumexp(torch.cat(parts, -1), -1, keepdim=True) if parts else q.new_zeros(*q.shape[:-1], 1)
    return lse.masked_fill(torch.isneginf(lse), 0)


def _score_gradient(
    p: Problem, q: Tensor, rows: slice, keys: slice, masked: bool, d_out: Tensor, delta: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of a run's scores after softcap, the probabilities, and the softcap's derivative."""
    s, slope = p.scores(q, rows, keys, masked)
    prob = s.sub_(lse).exp_()
    d_prob = (d_out.flatten(2, 3) @ p.values[:, :, keys].transpose(-1, -2)).view_as(prob)
    return d_prob.sub_(delta).mul_(prob), prob, slope
