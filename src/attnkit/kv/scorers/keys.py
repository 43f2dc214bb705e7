"""Scorers that look at keys and values alone, and at what was learnt of a model's queries."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit._core.errors import OptionError, ShapeError
from attnkit.kv.context import ScoreContext
from attnkit.kv.line import Line, must_stay
from attnkit.kv.registry import scorer
from attnkit.kv.weights import device_copy

__all__ = ["KeyDiff", "LagKV", "QFilter"]


@scorer("keydiff")
@dataclass(frozen=True)
class KeyDiff:
    """Keys that differ from the others: s_i = -cos(k_i, m), m the mean of the keys' directions.

    Source: Park et al. 2025, arXiv:2504.15364.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        directions = F.normalize(ctx.stored.keys.float(), dim=-1)
        counted = directions if ctx.stored.real is None else directions.masked_fill(~ctx.stored.real[..., None], 0)
        anchor = F.normalize(counted.sum(2, keepdim=True), dim=-1)  # of the mean only the direction counts
        return -(directions * anchor).sum(-1)


@scorer("qfilter")
@dataclass(frozen=True, eq=False)
class QFilter:
    """Keys that lie against the direction which queries avoid: s_i = -f_h . k_i.

    f_h is the dominant direction of the queries of key head h, learnt once a model.

    Args:
        filters: [layers, Hkv, D], or the path of a safetensors file with such a tensor "q_filters".
    Raises:
        OptionError: no filters.
    Source: Godey et al. 2025, arXiv:2503.02812.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    filters: Tensor | str | None = None

    def __post_init__(self) -> None:
        if self.filters is None:
            raise OptionError("qfilter needs filters, learnt on the model; attnkit.inference.calibrate learns them")

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32.

        Raises:
            InputError: the file has no such tensor.
            ShapeError: the filters were learnt on another model.
        """
        device = ctx.stored.keys.device
        given = self.filters
        filters = given if isinstance(given, Tensor) else device_copy(str(given), "q_filters", device)
        expected = (ctx.layers, ctx.stored.shape[1], ctx.stored.keys.shape[-1])
        if tuple(filters.shape) != expected:
            raise ShapeError(f"filters has shape {tuple(filters.shape)}; the model has {expected} (layers, key heads, width)")
        own = filters[ctx.index].to(device, torch.float32)
        return -torch.einsum("bhsd,hd->bhs", ctx.stored.keys.float(), own)


@scorer("lagkv")
@dataclass(frozen=True)
class LagKV:
    """Tokens whose channels vary more than those of the block that follows would suggest.

    Behind the sinks, tokens stand in blocks of `lag`. With min and max of each channel over the next block,
    s = softmax over the block of std over channels of (x - min) / (max - min), the mean of keys and values. What counts is
    the rank in the block, unless `cross_scoring`; of equal ranks the newer is worth more. Sinks, the last whole block and
    what follows it stay. A head with fewer than two blocks keeps sinks and the newest.

    Args:
        sink: tokens at the beginning that stay.
        lag: tokens a block.
        cross_scoring: compare scores over blocks.
    Source: Liang et al. 2025, arXiv:2504.04704.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    sink: int = 4
    lag: int = 128
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        if self.lag < 1 or self.sink < 0:
            raise OptionError(f"sink={self.sink}, lag={self.lag} is not allowed; they count tokens, 0 or more and 1 or more")

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        line = Line.of(ctx)
        newest = must_stay(ctx.rank.expand(ctx.stored.shape).float(), ctx, sink=self.sink)
        blocks = (line.size - self.sink) // self.lag
        if blocks < 2:
            return newest
        states = (line.take(ctx.stored.keys.float()), line.take(ctx.stored.values.float()))
        scores = sum(self._spread(part, blocks) for part in states) / 2
        assert isinstance(scores, Tensor)
        own = (line.counts - self.sink).clamp(min=0) // self.lag  # [B, Hkv, 1], whole blocks of each head
        if not self.cross_scoring:
            order = scores.argsort(dim=-1, stable=True).argsort(-1)
            block = torch.arange(blocks - 1, device=line.device)[:, None]
            scores = (order + block / own[..., None].clamp(min=1)) / self.lag
        whole = scores.new_zeros(ctx.stored.shape)
        whole[..., self.sink : self.sink + (blocks - 1) * self.lag] = scores.flatten(2)
        recent = line.counts - self.sink - (own - 1) * self.lag
        return torch.where(own < 2, newest, must_stay(line.put(whole), ctx, sink=self.sink, recent=recent))

    def _spread(self, states: Tensor, blocks: int) -> Tensor:
        """[B, Hkv, S, D] -> [B, Hkv, blocks - 1, lag]."""
        parts = states[:, :, self.sink : self.sink + blocks * self.lag].unflatten(2, (blocks, self.lag))
        low, high = parts[:, :, 1:].amin(-2, keepdim=True), parts[:, :, 1:].amax(-2, keepdim=True)
        width = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        spread: Tensor = ((parts[:, :, :-1] - low) / width).std(-1).softmax(-1)
        return spread
