"""Budgets that were worked out beforehand, and budgets that follow from a threshold."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnkit._core.errors import OptionError, ShapeError
from attnkit.kv.budgets import each
from attnkit.kv.context import ScoreContext
from attnkit.kv.weights import table

__all__ = ["Curves", "PrefillAndEvery", "Threshold"]


@dataclass(frozen=True)
class Curves:
    """Each head's own ratio from a table, for the ratio asked for; rounded so that a layer's sum is right.

    c_h = (1 - table[100 ratio - 1, layer, h]) n; every head keeps floor(c_h), and those with the largest remainders one
    more until round(sum c_h) are kept. A head keeps at least one key.

    Args:
        path: the table [99, layers, Hkv] of fractions removed, for ratios 0.01 to 0.99: a `.npy` file, or the tensor
            "lukv" of a safetensors file.
    Source: LU-KV 2026, arXiv:2602.08585.
    """

    path: str

    def counts(self, ctx: ScoreContext, scores: Tensor, kept: int | Tensor) -> Tensor:
        """[B, Hkv] int64.

        Raises:
            ShapeError: the table is another model's.
        """
        curves = table(self.path, "lukv", 3)
        if curves.shape != (99, ctx.layers, scores.shape[1]):
            raise ShapeError(
                f"{self.path} has shape {tuple(curves.shape)}; this model needs [99, {ctx.layers}, {scores.shape[1]}]"
            )
        length = each(ctx.stored.length, scores).double()
        asked = 1 - each(kept, scores) / length.clamp(min=1)  # while decoding the schedule asks for a length
        ratio = torch.full_like(length, ctx.ratio) if ctx.phase == "prefill" else asked
        row = ((ratio[:, 0] * 100).round().long() - 1).clamp(0, 98)
        removed = curves[:, ctx.index].to(scores.device, torch.float64)[row]
        ideal = (1 - removed).clamp(0, 1) * length
        sure = ideal.floor().long()
        total = ideal.sum(-1).round().long().clamp(min=scores.shape[1])
        order = (ideal - sure).argsort(dim=-1, descending=True, stable=True)
        more = torch.arange(scores.shape[1], device=scores.device) < (total - sure.sum(-1))[:, None]
        counts = sure + torch.zeros_like(sure).scatter(-1, order, more.long())
        return counts.clamp(min=1).minimum(length.long())


@dataclass(frozen=True)
class Threshold:
    """Every head keeps the scores that reach a threshold.

    Args:
        threshold: the lowest score that stays.
    """

    threshold: float

    def counts(self, ctx: ScoreContext, scores: Tensor, kept: int | Tensor) -> Tensor:
        """[B, Hkv] int64; `kept`, and so the press's ratio, means nothing here."""
        del ctx, kept
        return (scores >= self.threshold).sum(-1)


@dataclass(frozen=True)
class PrefillAndEvery:
    """When the context has been read, and every `interval` tokens of decoding.

    Args:
        interval: tokens between two compressions, 1 or more.
    """

    decodes: ClassVar[bool] = True
    interval: int = 64

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise OptionError(f"interval={self.interval} is not allowed; it counts tokens, 1 or more")

    def due(self, *, phase: str, since: int) -> bool:
        """At the end of the prefill, and when the interval is over."""
        return phase == "prefill" or since >= self.interval

    def kept(self, length: int | Tensor, ratio: float, seen: int) -> int | Tensor:
        """All: the budget knows better."""
        del ratio, seen
        return length
