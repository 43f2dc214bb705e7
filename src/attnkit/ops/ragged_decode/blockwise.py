"""Ragged decode attention in plain torch: blocks of pages are copied out, and heads that end drop out of the walk."""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit.ops.ragged_decode.pages import KVPages

__all__ = ["attend"]

_BLOCK_NUMBERS = 1 << 18  # keys of a block, elements: with values and scores they stay in a CPU's second-level cache
Block = tuple[slice, Tensor, Tensor, Tensor | None, Tensor | None]


def attend(
    q: Tensor, pages: KVPages, sinks: Tensor | None, scale: float, softcap: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, Dv] and lse [B, T, H]; reads lengths on the host.

    Rows are pairs of batch row and key head, the longest first, so that a block concerns the first few of them.
    """
    batch, num_q, heads, _ = q.shape
    kv_heads = pages.table.shape[1]
    acc, group = accumulator_dtype(q.dtype), heads // kv_heads
    order = pages.lengths.flatten().argsort(descending=True, stable=True)
    rows = q.unflatten(2, (kv_heads, group)).permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)  # [B * Hkv, T * G, D]
    rows = rows[order].to(acc) * scale
    top = rows.new_full(rows.shape[:2], -torch.inf)
    total = torch.zeros_like(top)
    out = rows.new_zeros(*rows.shape[:2], pages.widths[1])
    if sinks is not None:
        sink = sinks.to(acc).unflatten(0, (kv_heads, group)).repeat(batch, num_q)[order]
        top, total = sink.clone(), (~torch.isneginf(sink)).to(acc)
    for live, keys, values, bias, hidden in _blocks(pages, order, acc):
        scores = rows[live] @ keys.transpose(-1, -2)
        if softcap:
            scores = torch.tanh_(scores / softcap).mul_(softcap)
        if bias is not None:
            scores += bias[:, None]
        if hidden is not None:
            scores.masked_fill_(hidden[:, None], -torch.inf)
        highest = torch.maximum(top[live], scores.amax(-1))
        shift = highest.masked_fill(torch.isneginf(highest), 0)
        fade = torch.exp(top[live] - shift)
        prob = scores.sub_(shift[..., None]).exp_()
        total[live] = total[live] * fade + prob.sum(-1)
        out[live] = torch.baddbmm(out[live] * fade[..., None], prob, values)
        top[live] = highest
    empty = total == 0
    out = out / total.masked_fill(empty, 1)[..., None]
    lse = (top + total.masked_fill(empty, 1).log()).masked_fill(empty, -torch.inf)
    back = order.argsort()
    shape = (batch, kv_heads, num_q, group)
    out = out[back].view(*shape, out.shape[-1]).permute(0, 2, 1, 3, 4).flatten(2, 3)
    return out.to(out_dtype).contiguous(), lse[back].view(shape).permute(0, 2, 1, 3).flatten(2, 3).contiguous()


def _blocks(pages: KVPages, order: Tensor, acc: torch.dtype) -> Iterator[Block]:
    """(rows that have keys here, keys [rows, n, D], values, bias, tokens of [rows, n] that nobody sees)."""
    size, lengths = pages.page_size, pages.lengths.flatten()[order]
    table = pages.table.flatten(0, 1)[order].long()
    longest = int(lengths.max()) if lengths.numel() else 0
    first = 0
    while first < longest:
        count = int((lengths > first).sum())
        step = max(_BLOCK_NUMBERS // (count * pages.widths[0] * size), 1) * size
        live, num_pages = slice(0, count), min(step // size, -(-(longest - first) // size))
        left = lengths[live] - first
        numbers = table[live, first // size : first // size + num_pages]
        if int(left[-1]) < num_pages * size:  # the shortest of them ends here
            unused = torch.arange(num_pages, device=table.device) * size >= left[:, None]
            numbers = numbers.masked_fill(unused, 0)
        keys, values = (t.flatten(1, 2) for t in pages.gather(numbers, acc))
        bias = None if pages.bias is None else pages.bias[numbers].flatten(1).to(acc)
        yield live, *_hide(keys, values, bias, left)
        first += num_pages * size
    if pages.tail_keys is None or pages.tail_values is None or pages.tail_lengths is None:
        return
    lengths = pages.tail_lengths.flatten()[order]
    longest = int(lengths.max()) if lengths.numel() else 0
    step = max(_BLOCK_NUMBERS // max(lengths.numel() * pages.widths[0], 1), 1)
    for first in range(0, longest, step):
        part = slice(first, min(first + step, longest))
        keys, values = (t[:, :, part].flatten(0, 1)[order].to(acc) for t in (pages.tail_keys, pages.tail_values))
        bias = None if pages.tail_bias is None else pages.tail_bias[:, :, part].flatten(0, 1)[order].to(acc)
        yield slice(0, lengths.numel()), *_hide(keys, values, bias, lengths - first)


def _hide(
    keys: Tensor, values: Tensor, bias: Tensor | None, left: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Tokens beyond a length, and those that the bias masks, may hold anything: they are made 0 and named."""
    hidden = torch.arange(keys.shape[1], device=keys.device) >= left[:, None]
    if bias is not None:
        hidden = hidden | torch.isneginf(bias)
    if not bool(hidden.any()):
        return keys, values, bias, None
    unseen = hidden[..., None]
    bias = None if bias is None else bias.masked_fill(hidden, 0)
    return keys.masked_fill_(unseen, 0), values.masked_fill_(unseen, 0), bias, hidden
