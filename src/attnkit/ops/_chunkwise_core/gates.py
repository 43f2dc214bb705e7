"""The running maximum that keeps exponential gates in range, and what it makes of them.

m_t = max(log_f_t + m_{t-1}, i_t) depends on gates alone. In units of exp(m) a recurrence with exponential input gates is an
ordinary one, with log decays log_f_t + m_{t-1} - m_t and log weights i_t - m_t, neither above 0: no maximum has to be taken,
and nothing rescaled, where queries and keys are multiplied.

Gradients treat m as a constant in these two, since results do not depend on it; what they do depend on (a constant added to a
denominator) comes back as the gradient of m, and goes along the path of the maximum. The units of states at the beginning and
at the end are the caller's to count.
"""

import torch
from torch import Tensor

from attnkit.ops._chunkwise_core.layout import ChunkLayout

__all__ = ["LOWEST", "WHATEVER", "backward", "forward"]

LOWEST = -1e4  # the log of a decay to nothing, in every dtype
WHATEVER = 64  # rows of a chunk where only boundaries of sequences count


def forward(layout: ChunkLayout, log_f: Tensor, i: Tensor, m0: Tensor | None) -> tuple[Tensor, ...]:
    """Decays, weights and m.

    Args:
        layout: chunks.
        log_f, i: [R, H], finite log decays and log weights (-inf: none).
        m0: [N, H], at the beginning; None means 0.
    Returns:
        log decays, log weights and m, [R, H]; m at the end [N, H]; and the row whose i each m comes from, [R, H] int64, -1
        where it comes from m0.
    """
    carried = (i.new_zeros(layout.num_seqs, i.shape[1]) if m0 is None else m0).to(torch.float64, copy=True)
    origin = torch.full(carried.shape, -1, dtype=torch.int64, device=i.device)
    sums = layout.split(log_f).double().cumsum(1)  # [C, L, H]
    top, place = (layout.split(i, -torch.inf).double() - sums).cummax(1)
    place = place + layout.chunk_start[:, None, None]
    whole, best, best_place = (t[:, -1] for t in (sums, sums[:, -1:] + top, place))
    before, origin_before = torch.empty_like(whole), torch.empty_like(best_place)
    for chunks, seqs in layout.steps():
        now, now_origin = carried[seqs].clone(), origin[seqs].clone()
        before[chunks], origin_before[chunks] = now, now_origin
        kept = whole[chunks] + now
        carried[seqs] = torch.maximum(kept, best[chunks])
        origin[seqs] = torch.where(best[chunks] > kept, best_place[chunks], now_origin)
    higher = top > before[:, None]
    source = layout.join(torch.where(higher, place, origin_before[:, None]))
    # any m is right where all is relative to the same one: rounded first, so that a state goes on where it was left
    m = layout.join(sums + torch.where(higher, top, before[:, None])).to(i.dtype)
    first, last, filled = _ends(layout)
    m_last = i.new_zeros(carried.shape) if m0 is None else m0.clone()
    previous = torch.cat([m[:1], m[:-1]])
    previous[first] = m_last[filled]
    m_last[filled] = m[last]
    decay = log_f.double() + previous.double() - m.double()
    return decay.to(i.dtype), (i.double() - m.double()).to(i.dtype), m, m_last, source


def backward(
    layout: ChunkLayout, d_decay: Tensor, d_gain: Tensor, d_m: Tensor, d_last: Tensor, source: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of log_f, i [R, H] and m0 [N, H] from those of what `forward` returns."""
    first, last, filled = _ends(layout)
    d_m0 = d_last.clone()
    reaching = d_m.double().clone()
    reaching[last] += d_last[filled]
    routed = torch.zeros_like(reaching)
    routed.scatter_add_(0, source.clamp(min=0), reaching.masked_fill(source < 0, 0))
    # log_f_u is on the way from the row of an i to those that took their m from it
    passing = (reaching - routed).flip(0).cumsum(0).flip(0)
    after = torch.cat([passing, passing.new_zeros(1, passing.shape[1])])[layout.cu_seqlens[1:]]
    lengths = layout.cu_seqlens.diff()
    passing = passing - after.repeat_interleave(lengths, 0)
    d_m0[filled] = passing[first].to(d_m0.dtype)
    return d_decay + passing.to(d_decay.dtype), d_gain + routed.to(d_gain.dtype), d_m0


def _ends(layout: ChunkLayout) -> tuple[Tensor, Tensor, Tensor]:
    """First and last rows of the sequences that have rows, and which these are."""
    filled = (layout.cu_seqlens.diff() > 0).nonzero()[:, 0]
    return layout.cu_seqlens[filled], layout.cu_seqlens[filled + 1] - 1, filled
