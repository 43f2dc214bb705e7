"""Launching the kernels of the running maximum: what `gates` computes, of the same arguments. No host synchronisation."""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.triton.launcher import launch
from attnkit.ops._chunkwise_core._triton import gates as kernels
from attnkit.ops._chunkwise_core._triton.table import ChunkTable

__all__ = ["backward", "forward"]

_CHUNKS = 128  # that a step of the scan takes


def forward(log_f: Tensor, i: Tensor, m0: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int) -> tuple[Tensor, ...]:
    """Log decays, log weights and m, as log_f and i [B, T, H] or packed [R, H]; m at the end; rows that m comes from."""
    t, heads = ChunkTable.of(i, cu_seqlens, chunk_size), i.shape[-1]
    decay, gain, m = (i.new_empty(i.shape) for _ in range(3))
    source = i.new_empty(i.shape, dtype=torch.int64)
    m_last = i.new_empty(t.num_seqs, heads)
    if not t.num_seqs:
        return decay, gain, m, m_last, source
    if cu_seqlens is not None:
        log_f, i = log_f[None], i[None]
    m0 = None if m0 is None else m0.contiguous()
    whole, best = torch.empty(2, t.num_chunks, heads, dtype=torch.float64, device=i.device).unbind()
    place = source.new_empty(t.num_chunks, heads)
    block_h = t.block_heads(heads)
    grid = (-(-heads // block_h) * t.num_chunks,)
    flags = {"BLOCK_L": t.chunk_size, "BLOCK_H": block_h}
    inputs = (*log_f.stride(), *i.stride(), t.each, t.length, heads)
    where = (t.chunk_start, t.chunk_len)

    def go(kernel: Any, *arguments: Any) -> None:
        if t.num_rows:
            launch(kernel, grid, (log_f, i, *arguments), flags, num_warps=4)

    go(kernels.chunk_maxima, whole, best, place, *where, *inputs)
    launch(
        kernels.scan_maxima, (t.num_seqs * heads,), (whole, best, place, m0, m_last, t.first_chunk, t.each, heads),
        {"BLOCK_C": _CHUNKS}, num_warps=4,
    )  # fmt: skip
    go(kernels.running_maxima, best, place, m0, m, source, t.chunk_seq, *where, t.first_chunk, *inputs)
    go(kernels.apply_units, m, m0, decay, gain, t.chunk_seq, *where, *inputs, t.num_seqs)
    return decay, gain, m, m_last, source


def backward(
    d_decay: Tensor, d_gain: Tensor, d_m: Tensor, d_last: Tensor, source: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of log_f, i and m0.

    Rows that take their m from one row follow each other, that row first: what goes to it is summed over the rest of its run,
    and passes the log decays of all rows of the run but the first.
    """
    bounds = _boundaries(source, cu_seqlens)
    rows, heads = source.flatten(0, -2), source.shape[-1]
    num_rows = rows.shape[0]
    empty = (bounds.diff() == 0)[:, None]
    if num_rows == 0:
        return d_decay, d_gain, d_last
    place = torch.arange(num_rows, device=source.device)
    reaching = d_m.reshape(num_rows, heads).T.double()  # [H, R], since torch scans rows of memory best
    reaching = reaching.index_add(1, (bounds[1:] - 1).clamp(min=0), d_last.double().masked_fill(empty, 0).T)
    own = place == rows.T
    opens = torch.zeros(num_rows + 1, dtype=torch.bool, device=source.device).index_fill(0, bounds, True)[:-1]
    # the first row of the next run, R where there is none
    next_run = torch.where(own | opens, place, num_rows).flip(1).cummin(1).values.flip(1)
    next_run = torch.cat([next_run[:, 1:], next_run.new_full((heads, 1), num_rows)], 1)
    to_end = torch.cat([reaching.flip(1).cumsum(1).flip(1), reaching.new_zeros(heads, 1)], 1)
    rest = to_end[:, :-1] - to_end.gather(1, next_run)
    passing, routed = (
        t.T.to(d_decay.dtype).reshape(source.shape) for t in (rest.masked_fill(own, 0), rest.masked_fill(~own, 0))
    )
    first = passing.reshape(num_rows, heads)[bounds[:-1].clamp(max=num_rows - 1)]
    return d_decay + passing, d_gain + routed, torch.where(empty, d_last, first)


def _boundaries(source: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """First rows of sequences, and R, int64."""
    if cu_seqlens is not None:
        return cu_seqlens.long()
    batch, length = source.shape[:2]
    return torch.arange(batch + 1, device=source.device) * length
