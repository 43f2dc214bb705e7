"""Budgets: how many keys each head keeps."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.kv.context import ScoreContext
from attnkit.kv.registry import wrapper
from attnkit.kv.selectors import highest

__all__ = ["Budget", "HeadAdaptive", "PerLayer", "Pyramid", "Uniform", "each", "kept_of"]


class Budget(Protocol):
    """How many keys the heads of one layer keep.

    A budget that shares over layers has `across_layers = True` and a method `share(scores, contexts)`, see `Press`.
    """

    def counts(self, ctx: ScoreContext, scores: Tensor, kept: int | Tensor) -> int | Tensor:
        """Keys to keep.

        Args:
            ctx: the layer.
            scores: [B, Hkv, S] float32, -inf where nothing real is stored.
            kept: [B, Hkv] int64, or one number for all heads: what the ratio or the target asks of a head if all are
                treated alike.
        Returns:
            [B, Hkv] int64, or one number; at most the head's real tokens.
        """
        ...


def kept_of(lengths: int | Tensor, ratio: float) -> int | Tensor:
    """What a ratio leaves of lengths (int64): max(1, floor(n (1 - ratio))), and 0 of nothing."""
    if isinstance(lengths, int):
        return max(1, int(lengths * (1 - ratio))) if lengths else 0
    return torch.where(lengths > 0, (lengths.double() * (1 - ratio)).floor().long().clamp(min=1), 0)


def each(kept: int | Tensor, scores: Tensor) -> Tensor:
    """`kept` as [B, Hkv] int64."""
    return torch.full(scores.shape[:2], kept, device=scores.device) if isinstance(kept, int) else kept


@dataclass(frozen=True)
class Uniform:
    """Every head keeps the same share."""

    def counts(self, ctx: ScoreContext, scores: Tensor, kept: int | Tensor) -> int | Tensor:
        """[B, Hkv] int64, or one number: `kept`."""
        del ctx, scores
        return kept


@dataclass(frozen=True)
class HeadAdaptive:
    """The heads of a layer share one budget: those with many high scores keep more.

    Each head is sure of `alpha` times its share; the rest goes to the highest scores of the layer, of equal ones to the first
    head's.

    Args:
        alpha: 0 to 1.
    Source: Feng et al. 2024 (AdaKV), arXiv:2407.11550.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"alpha={self.alpha} is not allowed; it is a share, from 0 to 1")

    def counts(self, ctx: ScoreContext, scores: Tensor, kept: int | Tensor) -> int | Tensor:
        """[B, Hkv] int64, in sum what `kept` is."""
        del ctx
        scores = scores.clamp(max=torch.finfo(torch.float32).max)  # infinity is for what a head is sure of
        if isinstance(kept, int):  # no head has gaps
            sure = highest(scores, min(max(1, int(kept * self.alpha)), kept))
            guarded = scores.masked_fill(sure, torch.inf).flatten(1)
            return highest(guarded, kept * scores.shape[1]).view(scores.shape).sum(-1)
        size = scores.shape[-1]
        order = scores.argsort(dim=-1, descending=True, stable=True)
        place = torch.empty_like(order).scatter_(-1, order, torch.arange(size, device=order.device).expand_as(order))
        safe = (kept.double() * self.alpha).long().clamp(min=1)[..., None]
        guarded = scores.masked_fill(place < safe, torch.inf).masked_fill(scores == -torch.inf, -torch.inf)
        flat = guarded.flatten(1)
        joint = flat.argsort(dim=-1, descending=True, stable=True)
        total = kept.sum(-1, keepdim=True)
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen.scatter_(-1, joint, torch.arange(flat.shape[-1], device=flat.device) < total)
        counts: Tensor = (chosen & (flat > -torch.inf)).view(scores.shape).sum(-1)
        return counts


@dataclass(frozen=True)
class PerLayer:
    """A ratio for each layer in place of one for all.

    Args:
        ratios: one a layer, each from 0 up to but not including 1.
    """

    ratios: tuple[float, ...]

    def counts(self, ctx: ScoreContext, scores: Tensor, kept: int | Tensor) -> int | Tensor:
        """[B, Hkv] int64, or one number.

        Raises:
            OptionError: as many ratios as layers are needed.
        """
        del scores, kept
        if len(self.ratios) != ctx.layers:
            raise OptionError(f"ratios has {len(self.ratios)} entries; the model has {ctx.layers} layers")
        return kept_of(ctx.stored.length, self.ratios[ctx.index])


@dataclass(frozen=True)
class Pyramid:
    """More keys in the first layers, fewer in the last, on a line.

    With the mean budget m and n real tokens, the last layer gets m / beta and the first 2 m less that, at most n - window; the
    sum over layers is what `Uniform` gives, to the token. Where the last layer would not even keep the window, all get m.

    Args:
        window: tokens that the scorer keeps in any case.
        beta: 1 or more.
    Source: Cai et al. 2024 (PyramidKV), arXiv:2406.02069.
    """

    window: int = 64
    beta: float = 20.0

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise OptionError(f"beta={self.beta} is not allowed; the last layer keeps the mean over beta: 1 or more")

    def counts(self, ctx: ScoreContext, scores: Tensor, kept: int | Tensor) -> int | Tensor:
        """[B, Hkv] int64, or one number."""
        del scores
        if isinstance(kept, int):
            length = ctx.stored.length
            assert isinstance(length, int)
            return int(self._counts(ctx, torch.tensor(kept), torch.tensor(length)))  # both on the host
        return self._counts(ctx, kept, torch.as_tensor(ctx.stored.length, device=kept.device))

    def _counts(self, ctx: ScoreContext, kept: Tensor, length: Tensor) -> Tensor:
        mean = kept.double()
        last = torch.maximum(mean / self.beta, 2 * mean - (length - self.window))
        first = 2 * mean - last
        fits = (length >= first) & (first >= last) & (last >= self.window)
        layers = ctx.layers

        def below(count: int) -> Tensor:  # budget of the first `count` layers, so that rounding adds up
            return (count * first - (first - last) / max(layers - 1, 1) * count * (count - 1) / 2).round()

        own = (below(ctx.index + 1) - below(ctx.index)).long()
        return torch.where(fits & (layers > 1), own, kept)


@wrapper("adakv")
def _adakv(press: Any, alpha: float = 0.2) -> Any:
    """The heads of a layer share one budget: those with many high scores keep more.

    Source: Feng et al. 2024 (AdaKV), arXiv:2407.11550.
    """
    return replace(press, budget=HeadAdaptive(alpha))


@wrapper("per_layer")
def _per_layer(press: Any, ratios: tuple[float, ...] = ()) -> Any:
    """A ratio for each layer, `ratios`, in place of one for all."""
    return replace(press, budget=PerLayer(tuple(ratios)))
