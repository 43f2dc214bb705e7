"""Ragged decode attention by its definition: everything in plain tensors, the whole score matrix, a mask."""

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit.ops.attention.reference import MAX_PAIRS
from attnkit.ops.ragged_decode.call import RaggedCall

__all__ = ["dense", "reference", "reference_refuses"]


def reference(call: RaggedCall) -> tuple[Tensor, Tensor]:
    """The defining formula; in 16 bits the naive form, which decodes to q's dtype (see `attention.reference`)."""
    return dense(call, *call.pages.materialize(call.q.dtype))


def dense(call: RaggedCall, keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The same on what `KVPages.materialize` returns."""
    q, acc = call.q, accumulator_dtype(call.q.dtype)
    bias = call.pages.materialize_bias()
    group = q.shape[2] // keys.shape[1]
    keys, values, seen = (t.repeat_interleave(group, 1) for t in (keys, values, seen))
    scores = q.transpose(1, 2).to(acc) @ keys.to(acc).transpose(-1, -2) * call.scale  # [B, H, T, S]
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if bias is not None:
        bias = bias.to(acc).repeat_interleave(group, 1)
        seen = seen & ~torch.isneginf(bias)
        values = values.masked_fill(~seen[..., None], 0)
        scores = scores + bias.masked_fill(~seen, 0)[:, :, None]
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    if call.sinks is not None:  # a sink is one more key whose value is zero
        sinks = call.sinks.to(acc)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    empty = torch.isneginf(scores).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)
    lse = torch.logsumexp(scores, -1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
    prob = torch.exp(scores - lse).masked_fill(empty, 0)[..., : values.shape[2]]
    out = prob.to(q.dtype).to(acc) @ values.to(acc)
    return out.transpose(1, 2).to(call.out_dtype), lse.masked_fill(empty, -torch.inf)[..., 0].transpose(1, 2)


def reference_refuses(call: RaggedCall) -> list[str]:
    """What is too long to be written down."""
    pages = call.pages
    tail = 0 if pages.tail_keys is None else pages.tail_keys.shape[2]
    pairs = call.q.shape[1] * (pages.table.shape[2] * pages.page_size + tail)
    return [f"{pairs} scores a head; it writes them all down and stops at {MAX_PAIRS}"] if pairs > MAX_PAIRS else []
