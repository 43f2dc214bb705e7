"""Scorers that look at keys and positions alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnkit.kv.context import ScoreContext
from attnkit.kv.registry import scorer

__all__ = ["Knorm", "Random", "Streaming"]


@scorer("random")
@dataclass(frozen=True)
class Random:
    """Uniform in [0, 1): what any other method has to beat.

    Args:
        seed: of the generator; the same layer and length give the same scores.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    seed: int = 0

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + ctx.index)
        return torch.rand(ctx.stored.shape, generator=generator).to(ctx.stored.keys.device)


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
        rank = ctx.rank.float()
        return torch.where(rank < self.sink, torch.inf, rank).expand(ctx.stored.shape)
