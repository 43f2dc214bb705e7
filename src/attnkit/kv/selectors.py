"""Selectors: which keys a head keeps, once it is known how many."""

from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from attnkit.kv.context import ScoreContext

__all__ = ["Kept", "Selector", "TopK", "best", "gather", "highest"]


@dataclass(frozen=True)
class Kept:
    """The stored tokens that stay.

    Attributes:
        index: [B, Hkv, M] int64 into the stored tokens, ascending; entries beyond a head's length are anything in range.
        lengths: [B, Hkv] int64; None means M for all, which needs no look at the device.
    """

    index: Tensor
    lengths: Tensor | None = None

    @classmethod
    def of_mask(cls, mask: Tensor) -> Self:
        """Those where mask [B, Hkv, S] holds, in order."""
        size = mask.shape[-1]
        place = torch.where(mask, mask.cumsum(-1) - 1, size)
        index = place.new_zeros(*mask.shape[:2], size + 1)
        index.scatter_(-1, place, torch.arange(size, device=mask.device).expand_as(place))
        return cls(index[..., :size], mask.sum(-1))

    def mask(self, size: int) -> Tensor:
        """[B, Hkv, size] bool."""
        mask = torch.zeros(*self.index.shape[:2], size, dtype=torch.bool, device=self.index.device)
        return mask.scatter_(-1, self.index, True) if self.lengths is None else _scatter(mask, self.index, self.live())

    def live(self) -> Tensor:
        """[B, Hkv, M] bool: which entries of `index` count."""
        if self.lengths is None:
            return torch.ones_like(self.index, dtype=torch.bool)
        return torch.arange(self.index.shape[-1], device=self.index.device) < self.lengths[..., None]


def _scatter(mask: Tensor, index: Tensor, live: Tensor) -> Tensor:
    wider = torch.cat([mask, mask[..., :1]], dim=-1)
    wider.scatter_(-1, torch.where(live, index, mask.shape[-1]), True)
    return wider[..., :-1]


class Selector(Protocol):
    """Which keys stay."""

    def select(self, ctx: ScoreContext, scores: Tensor, counts: int | Tensor, scorer: Any) -> Kept:
        """Choose.

        Args:
            ctx: the layer.
            scores: [B, Hkv, S] float32, -inf where nothing real is stored.
            counts: [B, Hkv] int64, or one number for all heads; at most the head's real tokens.
            scorer: what made the scores, for selectors that score parts anew.
        """
        ...


def gather(states: Tensor, index: Tensor) -> Tensor:
    """[B, Hkv, S, D] at index [B, Hkv, M] -> [B, Hkv, M, D]."""
    return states.gather(2, index[..., None].expand(-1, -1, -1, states.shape[-1]))


def highest(scores: Tensor, count: int) -> Tensor:
    """Bool like scores [..., S]: the `count` highest of each row, NaN first; of equal ones those that come earlier."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf)
    least = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, level = scores > least, scores == least
    return above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def best(scores: Tensor, counts: int | Tensor) -> Kept:
    """The `counts` highest scores of each head, in the order in which they are stored; of equal ones the earlier stay."""
    if isinstance(counts, int):
        return Kept(Kept.of_mask(highest(scores, counts)).index[..., :counts])
    order = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(scores.shape[-1], device=scores.device) < counts[..., None]
    return Kept.of_mask(torch.zeros_like(chosen.expand_as(order)).scatter(-1, order, chosen.expand_as(order)))


@dataclass(frozen=True)
class TopK:
    """The highest scores of each head; of equal ones those that come earlier."""

    def select(self, ctx: ScoreContext, scores: Tensor, counts: int | Tensor, scorer: Any) -> Kept:
        """The highest."""
        del ctx, scorer
        return best(scores, counts)
