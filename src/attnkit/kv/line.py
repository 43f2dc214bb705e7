"""The real tokens of each head in one line, for whatever counts neighbours, windows or blocks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from attnkit.kv.context import ScoreContext

__all__ = ["MUST_STAY", "Line", "must_stay", "standardised"]

MUST_STAY = 2.0**100
"""What `must_stay` gives: above every score, and the sum of ten million of them is finite."""


@dataclass(frozen=True)
class Line:
    """Chosen tokens of each head, moved to its front in their order; what lies behind them is anything.

    Attributes:
        index: [B, Hkv, S] int64, the stored token at each place; None where all stand in their places.
        lengths: [B, Hkv] int64, chosen tokens a head, or one number.
        size: S.
        device: of the tokens.
    """

    index: Tensor | None
    lengths: Tensor | int
    size: int
    device: torch.device

    @classmethod
    def of(cls, ctx: ScoreContext, mask: Tensor | None = None) -> Self:
        """The real tokens, or those where mask [B, Hkv or 1, S] holds."""
        size = ctx.stored.shape[2]
        mask = ctx.stored.real if mask is None else mask
        if mask is None:
            return cls(None, size, size, ctx.stored.keys.device)
        mask = mask.expand(ctx.stored.shape)
        return cls((~mask).to(torch.int8).argsort(dim=-1, stable=True), mask.sum(-1), size, mask.device)

    @cached_property
    def live(self) -> Tensor:
        """[B, Hkv, S] bool, or [1, 1, S]: the places that hold a token."""
        if isinstance(self.lengths, int):
            return torch.ones(1, 1, self.size, dtype=torch.bool, device=self.device)
        return torch.arange(self.size, device=self.device) < self.lengths[..., None]

    @cached_property
    def counts(self) -> Tensor:
        """[B, Hkv, 1] int64, or [1, 1, 1]: `lengths`."""
        if isinstance(self.lengths, int):
            return torch.full((1, 1, 1), self.lengths, device=self.device)
        return self.lengths[..., None]

    def take(self, states: Tensor) -> Tensor:
        """States [B, Hkv, S, ...] in line, 0 where there is no token."""
        if self.index is None:
            return states
        extra = (1,) * (states.dim() - 3)
        moved = states.gather(2, self.index.reshape(*self.index.shape, *extra).expand(-1, -1, -1, *states.shape[3:]))
        return moved.masked_fill(~self.live.reshape(*self.live.shape, *extra), 0)

    def put(self, scores: Tensor) -> Tensor:
        """Scores [B, Hkv, S] of the line back at the tokens' places."""
        return scores if self.index is None else torch.empty_like(scores).scatter_(-1, self.index, scores)


def must_stay(scores: Tensor, ctx: ScoreContext, *, sink: int = 0, recent: int | Tensor = 0) -> Tensor:
    """`scores` with the first `sink` and the last `recent` real tokens of each head above all others.

    Where not even those can stay, sinks are worth more than recent tokens, and newer ones more than older ones.

    Args:
        scores: [B, Hkv, S] float32.
        sink, recent: tokens; `recent` may be [B, Hkv, 1] int64.
    """
    rank = ctx.rank
    worth = MUST_STAY * (1 + rank * 2.0**-23)
    length = ctx.stored.length
    end = length if isinstance(length, int) else length[..., None]
    scores = torch.where(rank >= end - recent, worth, scores)
    return torch.where(rank < sink, 2 * worth, scores)


def standardised(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores [B, Hkv, S] less their mean over a row's heads and tokens, in units of the standard deviation (n - 1).

    Args:
        scores: [B, Hkv, S] float32.
        mask: [B or 1, Hkv or 1, S] bool, the entries that count; the others get anything.
    """
    mask = mask.expand(scores.shape)
    inside = scores.masked_fill(~mask, 0)
    count = mask.sum((1, 2), keepdim=True)
    mean = inside.sum((1, 2), keepdim=True) / count.clamp(min=1)
    off = (scores - mean).masked_fill(~mask, 0)
    deviation = (off.square().sum((1, 2), keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return (scores - mean) / deviation.clamp(min=1e-6)
