"""Scorers that look at keys and positions alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnkit.kv.context import ScoreContext
from attnkit.kv.line import must_stay
from attnkit.kv.registry import scorer

__all__ = ["Knorm", "Random", "Streaming"]


@scorer("random")
@dataclass(frozen=True)
class Random:
    """Uniform in [0, 1): what any other method has to beat.

    Args:
        seed: of the generator; a token's score depends on the layer, the head and its place among the head's real tokens.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    seed: int = 0

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + ctx.index)
        _, heads, size = ctx.stored.shape
        draws = torch.rand(size, heads, generator=generator).to(ctx.stored.keys.device).mT
        rank = ctx.rank.clamp(min=0).expand(ctx.stored.shape)
        return draws.expand(rank.shape).gather(-1, rank)


@scorer("knorm")
@dataclass(frozen=True)
class Knorm:
    """Keys with a small norm are worth more: s = -|k|.

    Source: Devoto et al. 2024, arXiv:2406.11430.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        norm: Tensor = torch.linalg.vector_norm(ctx.stored.keys.float(), dim=-1)
        return -norm


@scorer("streaming_llm")
@dataclass(frozen=True)
class Streaming:
    """The first `sink` tokens and the newest ones.

    Args:
        sink: tokens at the beginning of a row.
    Source: Xiao et al. 2023, arXiv:2309.17453.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    sink: int = 4

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32: the rank, so that newer is worth more; sinks are worth most."""
        return must_stay(ctx.rank.float().expand(ctx.stored.shape), ctx, sink=self.sink)
