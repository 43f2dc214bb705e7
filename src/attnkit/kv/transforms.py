"""Transforms: what happens to keys and values beside dropping, and the wrappers that put it into a press."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.kv.context import ScoreContext, Stored
from attnkit.kv.pressing import Press
from attnkit.kv.registry import base, wrapper
from attnkit.kv.schedules import Every
from attnkit.kv.scorers.attention import received
from attnkit.kv.selectors import Kept, highest

__all__ = ["KeepAll", "MergeNearest", "MergeWindow", "Rerotate", "ZeroChannels", "changing"]

_BLOCK = 2**22  # similarities of one head that are there at a time


def changing(press: Any, transform: Any) -> Any:
    """`press` with a transform.

    Raises:
        OptionError: it has one already.
    """
    if press.transform is not None:
        raise OptionError(
            f"{type(transform).__name__} and {type(press.transform).__name__} both change the cache; use one of them"
        )
    return replace(press, transform=transform)


def _dropped(ctx: ScoreContext, kept: Kept) -> tuple[Tensor, Tensor]:
    """[B, Hkv, S] bool each: which tokens stay, and which real ones go."""
    stays = kept.mask(ctx.stored.shape[2])
    return stays, ~stays & (ctx.rank >= 0)


@dataclass(frozen=True)
class MergeNearest:
    """Each dropped value goes into the kept token with the most similar key; keys stay as they are.

    With c the cosine of the two keys, w = c |v_dropped| / (|v_dropped| + |v_kept|) where c is at least `similarity`, and
    v_kept becomes (v_kept + sum of w v_dropped) / (1 + sum of w).

    Args:
        similarity: the least cosine, 0 to 1.
        fraction: of a head's dropped tokens that are similar enough, the most similar share that is merged; above 0, to 1.
    Source: a rule of kvpress, after Zhang et al. 2024 (CaM) and Wan et al. 2024 (D2O), arXiv:2406.13035.
    """

    similarity: float = 0.0
    fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.similarity <= 1 or not 0 < self.fraction <= 1:
            raise OptionError(
                f"similarity={self.similarity}, fraction={self.fraction} is not allowed; they are a cosine from 0 to 1 and a "
                f"share above 0, at most 1"
            )

    def change(self, ctx: ScoreContext, scores: Tensor, kept: Kept) -> Stored:
        """Kept values with the dropped ones in them."""
        del scores
        stays, goes = _dropped(ctx, kept)
        cosine, target = self._nearest(ctx.stored.keys, stays)
        merged = goes & (cosine >= self.similarity)
        if self.fraction < 1:
            order = cosine.masked_fill(~merged, -torch.inf).argsort(dim=-1, descending=True, stable=True)
            place = torch.empty_like(order).scatter_(
                -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
            )
            merged &= place < (merged.sum(-1, keepdim=True).double() * self.fraction).ceil()
        values = ctx.stored.values.float()
        norm = values.norm(dim=-1)
        weight = (cosine * norm / (norm + norm.gather(-1, target) + 1e-6)).masked_fill(~merged, 0)
        index = target[..., None].expand_as(values)
        total = values.scatter_add(2, index, weight[..., None] * values)
        shares = torch.ones_like(weight).scatter_add(-1, target, weight)
        return replace(ctx.stored, values=(total / shares[..., None]).to(ctx.stored.values.dtype))

    def _nearest(self, keys: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
        """[B, Hkv, S] each: the largest cosine with a key that stays, and which that is."""
        directions = keys.float() / keys.float().norm(dim=-1, keepdim=True).clamp(min=1e-6)
        size = keys.shape[2]
        block = max(_BLOCK // size, 1)
        found = []
        for start in range(0, size, block):
            cosines = directions[:, :, start : start + block] @ directions.mT
            found.append(cosines.masked_fill(~stays[:, :, None], -torch.inf).max(-1))
        return torch.cat([each.values for each in found], -1), torch.cat([each.indices for each in found], -1)


@dataclass(frozen=True)
class MergeWindow:
    """Each dropped value may be spread over the kept tokens that follow it.

    With A_i the attention that key i got from the queries at hand, a dropped value is merged with probability
    A_dropped / mean A of the next `targets` kept tokens, at most 1; then each of these m tokens gets v_dropped / m.

    Args:
        targets: kept tokens that share a dropped value, 1 or more.
        seed: of the draws.
    Source: Zhang et al. 2024 (CaM), ICML 2024.
    """

    targets: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.targets < 1:
            raise OptionError(f"targets={self.targets} is not allowed; it counts tokens, 1 or more")

    def change(self, ctx: ScoreContext, scores: Tensor, kept: Kept) -> Stored:
        """Values with the merged ones added."""
        del scores
        stays, goes = _dropped(ctx, kept)
        size = ctx.stored.shape[2]
        attention = received(ctx)[0]
        line = Kept.of_mask(stays)  # kept tokens of each head, in their order
        lengths = line.lengths
        assert lengths is not None
        before = stays.cumsum(-1)  # kept tokens up to here: the place of the next one
        many = (lengths[..., None] - before).clamp(max=self.targets)
        nexts = [line.index.gather(-1, (before + step).clamp(max=size - 1)) for step in range(min(self.targets, size))]
        heard = torch.zeros_like(attention)
        for step, target in enumerate(nexts):
            heard += attention.gather(-1, target) * (step < many)
        mean = heard / many.clamp(min=1)
        chance = torch.where(mean > 0, attention / mean, (attention > 0).float())
        merged = goes & (many > 0) & (self._draws(ctx) < chance)
        share = ctx.stored.values.float() * (merged / many.clamp(min=1))[..., None]
        added = torch.zeros_like(share)
        for step, target in enumerate(nexts):
            added.scatter_add_(2, target[..., None].expand_as(share), share * (step < many)[..., None])
        return replace(ctx.stored, values=(ctx.stored.values.float() + added).to(ctx.stored.values.dtype))

    def _draws(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv or 1, S], uniform; a token's depends on its rank alone, so padding and other rows change nothing."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + ctx.index) * 1_000_003 + 1)
        draws = torch.rand(ctx.stored.shape[2], generator=generator).to(ctx.stored.keys.device)
        return draws[ctx.rank.clamp(min=0)]


@dataclass(frozen=True)
class Rerotate:
    """Kept keys turn to neighbouring positions that end before the next token, as if the text had been shorter.

    `positions` then says where they stand, no longer where they came from. Padding between real tokens is refused, because
    positions count it and rotations need not.
    """

    contiguous: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"rope"})

    def change(self, ctx: ScoreContext, scores: Tensor, kept: Kept) -> Stored:
        """Keys and positions of the kept tokens."""
        del scores
        stored = ctx.stored
        stays, _ = _dropped(ctx, kept)
        positions = stored.positions.expand(stored.shape)
        last = positions.masked_fill(ctx.rank < 0, -1).amax(-1, keepdim=True)
        target = torch.where(stays, last + stays.cumsum(-1) - stays.sum(-1, keepdim=True), positions)
        if ctx.rope is None:
            return replace(stored, positions=target)
        turned = ctx.rope.rotate(stored.keys.flatten(0, 1)[:, :, None], (target - positions).flatten(0, 1))
        return replace(stored, keys=turned.reshape(stored.keys.shape), positions=target)


@dataclass(frozen=True)
class ZeroChannels:
    """The key channels that matter least to the newest queries become zero, as many as the press's ratio says.

    Channel c of a head counts sum over the group and the queries of q_c^2 times mean over keys of k_c^2.

    Args:
        window: newest queries.
    Source: Xu et al. 2024 (ThinK), arXiv:2407.21018.
    """

    window: int = 32

    def change(self, ctx: ScoreContext, scores: Tensor, kept: Kept) -> Stored:
        """Keys with channels of zeros."""
        del scores, kept
        keys, real = ctx.stored.keys, ctx.stored.real
        queries = ctx.queries[:, :, -self.window :].float()
        if ctx.query_real is not None:
            queries = queries.masked_fill(~ctx.query_real[:, None, -self.window :, None], 0)
        counted = keys.float() if real is None else keys.float().masked_fill(~real[..., None], 0)
        worth = ctx.mean_over_group(queries.square().sum(2)) * counted.square().sum(2)  # a head's order is all that counts
        gone = highest(-worth, int(keys.shape[-1] * ctx.ratio))
        return replace(ctx.stored, keys=keys.masked_fill(gone[:, :, None], 0))


@dataclass(frozen=True)
class KeepAll:
    """Every real token stays, whatever the budget is."""

    def select(self, ctx: ScoreContext, scores: Tensor, counts: int | Tensor, scorer: Any) -> Kept:
        """All."""
        del scores, counts, scorer
        real = ctx.stored.real
        if real is None:
            size = ctx.stored.shape[2]
            return Kept(torch.arange(size, device=ctx.stored.keys.device).expand(ctx.stored.shape))
        return Kept.of_mask(real.expand(ctx.stored.shape))


@dataclass(frozen=True)
class _Equal:
    needs: ClassVar[frozenset[str]] = frozenset()
    window: int

    def score(self, ctx: ScoreContext) -> Tensor:
        return torch.zeros(ctx.stored.shape, device=ctx.stored.keys.device)


@base("think")
def _think(window: int = 32) -> Press:
    """Key channels become zero; the ratio is the fraction of channels. All tokens stay.

    It frees no memory: keys keep their width. It shows what dropping channels would cost in quality.

    Args:
        window: newest queries, by which channels are judged.
    Source: Xu et al. 2024 (ThinK), arXiv:2407.21018.
    """
    return Press(scorer=_Equal(window), selector=KeepAll(), transform=ZeroChannels(window))


@wrapper("merge")
def _merge(press: Any, similarity: float = 0.0, fraction: float = 1.0) -> Any:
    """Dropped values go into the kept tokens with the most similar keys; see `MergeNearest`.

    Source: after Zhang et al. 2024 (CaM) and Wan et al. 2024 (D2O), arXiv:2406.13035.
    """
    return changing(press, MergeNearest(similarity, fraction))


@wrapper("cam")
def _cam(press: Any, interval: int = 512, target: int | None = 2048, targets: int = 32, seed: int = 0) -> Any:
    """While decoding, dropped values are spread over the kept tokens that follow; see `MergeWindow`.

    Source: Zhang et al. 2024 (CaM), ICML 2024.
    """
    # all queries since the last compression are kept, so that their attention can be summed
    return replace(changing(press, MergeWindow(targets, seed)), schedule=Every(interval, target), buffer=interval)


@wrapper("rerotate")
def _rerotate(press: Any) -> Any:
    """Kept keys turn to neighbouring positions, as if the text had been shorter."""
    return changing(press, Rerotate())
