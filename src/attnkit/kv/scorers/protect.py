"""Tokens that stay whatever another scorer says of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkit.kv.context import ScoreContext

__all__ = ["Protected", "protect"]


def protect(ctx: ScoreContext, scores: Tensor, first: int, last: int | Tensor) -> Tensor:
    """The scores with +inf for the first and last real tokens of each head.

    Args:
        ctx: the layer.
        scores: [B, Hkv, S].
        first: how many at the beginning.
        last: how many at the end; one number, or [B, Hkv] int64.
    """
    rank = ctx.rank
    length = ctx.stored.length
    if isinstance(last, Tensor):
        last = last[..., None]
    from_end = (length if isinstance(length, int) else length[..., None]) - rank
    return scores.masked_fill((rank >= 0) & ((rank < first) | (from_end <= last)), torch.inf)


@dataclass(frozen=True)
class Protected:
    """Another scorer, with the first and the newest tokens of each head worth most.

    Args:
        scorer: the other one.
        first: tokens at the beginning.
        last: tokens at the end.
    """

    scorer: Any
    first: int
    last: int

    @property
    def needs(self) -> frozenset[str]:
        """What the other needs."""
        return frozenset(self.scorer.needs)

    @property
    def window(self) -> int:
        """Of the other."""
        return int(getattr(self.scorer, "window", 1))

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        return protect(ctx, self.scorer.score(ctx), self.first, self.last)

    def replay(self, passed: Any, contexts: list[ScoreContext]) -> list[Tensor]:
        """[B, Hkv, S] float32 of each layer, where the other reads the context again."""
        scores = self.scorer.replay(passed, contexts)
        return [protect(ctx, score, self.first, self.last) for ctx, score in zip(contexts, scores, strict=True)]
