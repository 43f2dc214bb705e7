"""Budgets that all layers of a model share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.kv.budgets import each
from attnkit.kv.context import ScoreContext

__all__ = ["AcrossLayers", "Composite"]


@dataclass(frozen=True)
class AcrossLayers:
    """All heads of all layers share one budget: the highest scores of the model stay, and the best key of every head."""

    def counts(self, ctx: ScoreContext, scores: Tensor, kept: int | Tensor) -> Tensor:
        """[B, Hkv] int64: one layer alone."""
        return self.share([ctx], [scores], [kept])[0]

    def share(self, contexts: list[ScoreContext], scores: list[Tensor], kept: list[int | Tensor]) -> list[Tensor]:
        """[B, Hkv] int64 of each layer; a row's sum over heads and layers is that of `kept`."""
        del contexts
        shares = [each(*pair) for pair in zip(kept, scores, strict=True)]
        others, sure = [], []
        for score, share in zip(scores, shares, strict=True):
            best = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.argmax(-1, keepdim=True), True)
            others.append(score.masked_fill(best, -torch.inf).flatten(1))
            sure.append((share > 0).long())
        left = sum(share.sum(-1) - own.sum(-1) for share, own in zip(shares, sure, strict=True))
        flat = torch.cat(others, dim=-1)
        order = flat.argsort(dim=-1, descending=True, stable=True)
        chosen = torch.arange(flat.shape[-1], device=flat.device) < torch.as_tensor(left)[:, None]
        chosen = torch.zeros_like(chosen).scatter_(-1, order, chosen) & (flat > -torch.inf)
        parts = chosen.split([other.shape[-1] for other in others], dim=-1)
        return [own + part.unflatten(1, score.shape[1:]).sum(-1) for own, part, score in zip(sure, parts, scores, strict=True)]


@dataclass(frozen=True)
class Composite:
    """All layers share one budget, and the heads of a layer keep equally many.

    The k-th best tokens of a layer's heads, whichever they are, count as one: its score is the mean (or maximum) of
    theirs. The first layer gets, place by place, the highest of all layers' scores. The highest of the model stay.

    Args:
        heads: "mean" or "max", over the heads of a layer.
    Source: Akulov et al. 2025 (KVCompose), arXiv:2509.05165.
    """

    heads: str = "mean"

    def __post_init__(self) -> None:
        if self.heads not in ("mean", "max"):
            raise OptionError(f"heads={self.heads!r} is not allowed; it is 'mean' or 'max'")

    def counts(self, ctx: ScoreContext, scores: Tensor, kept: int | Tensor) -> Tensor:
        """[B, Hkv] int64: one layer alone keeps its share."""
        del ctx
        return each(kept, scores)

    def share(self, contexts: list[ScoreContext], scores: list[Tensor], kept: list[int | Tensor]) -> list[Tensor]:
        """[B, Hkv] int64 of each layer."""
        ranked = [score.sort(-1, descending=True).values for score in scores]
        joined = [score.mean(1, keepdim=True) if self.heads == "mean" else score.amax(1, keepdim=True) for score in ranked]
        first = min(range(len(contexts)), key=lambda place: contexts[place].index)
        joined[first] = torch.stack(joined).amax(0)
        one: list[Any] = [each(share, score)[:, :1] for share, score in zip(kept, scores, strict=True)]
        counts = AcrossLayers().share(contexts, joined, one)
        return [count.expand(score.shape[:2]) for count, score in zip(counts, scores, strict=True)]
