"""Query moments in plain torch, tokens a chunk at a time; what the kernels share with it: who counts, and how far to turn."""

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype

__all__ = ["counted", "moments", "turns"]

CHUNK = 4096  # queries of a row that are widened at once


def counted(q: Tensor, real: Tensor | None, skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """How many tokens of each row count, [B] in the accumulation dtype, and which, [B, T] bool; None where all do."""
    batch, tokens = q.shape[:2]
    kind = accumulator_dtype(q.dtype)
    if skip is None:
        taken = real
    elif real is None:
        taken = torch.arange(tokens, device=q.device) >= skip[:, None]
    else:
        taken = real & (real.cumsum(1) > skip[:, None])
    return (q.new_full((batch,), tokens, dtype=kind) if taken is None else taken.sum(1).to(kind)), taken


def turns(inv_freq: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, T, R / 2] of how far each pair was turned."""
    # in float64: at position 100,000 a float32 angle is off by up to 0.004 radians
    angle = positions[..., None].double() * inv_freq.double()
    return angle.cos().to(dtype), angle.sin().to(dtype)


def moments(
    q: Tensor,
    inv_freq: Tensor | None,
    positions: Tensor | None,
    interleaved: bool,
    real: Tensor | None,
    skip: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """count [B], sums [B, H, D] and products [B, H, D, D] in the accumulation dtype."""
    batch, tokens, heads, width = q.shape
    count, taken = counted(q, real, skip)
    sums = q.new_zeros(batch, heads, width, dtype=count.dtype)
    products = q.new_zeros(batch, heads, width, width, dtype=count.dtype)
    for start in range(0, tokens, CHUNK):
        part = slice(start, start + CHUNK)
        x = q[:, part].to(count.dtype)
        if inv_freq is not None and positions is not None:
            x = _turned_back(x, *turns(inv_freq, positions[:, part], count.dtype), interleaved)
        if shift is not None:
            x = x - shift[:, None]
        if taken is not None:
            x = torch.where(taken[:, part, None, None], x, 0)  # padding may hold anything
        sums += x.sum(1)
        x = x.transpose(1, 2)
        products += x.mT @ x
    return count, sums, products


def _turned_back(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    cos, sin = cos[:, :, None], sin[:, :, None]
    turning = 2 * cos.shape[-1]
    own, rest = x[..., :turning], x[..., turning:]
    first, second = (own[..., 0::2], own[..., 1::2]) if interleaved else own.chunk(2, dim=-1)
    pair = (first * cos + second * sin, second * cos - first * sin)
    own = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([own, rest], dim=-1)
