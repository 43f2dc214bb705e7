"""Query moments by their definition, a token at a time, pairs of channels as complex numbers."""

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit.ops.query_moments.call import MomentsCall

__all__ = ["centred", "reference", "sums_of"]


def centred(call: MomentsCall) -> Tensor:
    """x [B, T, H, D] in the accumulation dtype: each query turned back, less the shift."""
    x = call.q.to(accumulator_dtype(call.q.dtype), copy=True)
    if call.inv_freq is not None and call.positions is not None:
        half = len(call.inv_freq)
        for i, freq in enumerate(call.inv_freq.double().unbind()):
            a, b = (2 * i, 2 * i + 1) if call.interleaved else (i, i + half)
            turn = torch.polar(torch.ones_like(freq), -freq * call.positions)[:, :, None]  # [B or 1, T, 1]
            z = torch.complex(x[..., a], x[..., b]) * turn.to(torch.promote_types(x.dtype, torch.complex64))
            x[..., a], x[..., b] = z.real, z.imag
    return x if call.shift is None else x - call.shift[:, None]


def sums_of(call: MomentsCall, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """count, sums and products of x [B, T, H, D], over the tokens that count."""
    batch, tokens, heads, width = x.shape
    count = torch.zeros(batch, dtype=x.dtype, device=x.device)
    seen = torch.zeros(batch, dtype=torch.long, device=x.device)
    sums, products = x.new_zeros(batch, heads, width), x.new_zeros(batch, heads, width, width)
    for t in range(tokens):
        there = torch.ones_like(seen, dtype=torch.bool) if call.real is None else call.real[:, t]
        seen = seen + there
        taken = there if call.skip is None else there & (seen > call.skip)
        own = torch.where(taken[:, None, None], x[:, t], 0)
        count = count + taken
        sums = sums + own
        products = products + own[..., :, None] * own[..., None, :]
    return count, sums, products


def reference(call: MomentsCall) -> tuple[Tensor, Tensor, Tensor]:
    """count [B], sums [B, H, D] and products [B, H, D, D] in the accumulation dtype."""
    return sums_of(call, centred(call))
