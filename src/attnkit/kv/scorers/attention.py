"""Scorers that look at the attention which stored keys have received."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.kv.budgets import Pyramid
from attnkit.kv.context import ScoreContext
from attnkit.kv.line import Line, must_stay
from attnkit.kv.pressing import Press
from attnkit.kv.registry import base, scorer

__all__ = ["ObservedAttention", "SnapKV", "Tova", "received"]

_BLOCK = 2**22  # weights of one head that are there at a time


@scorer("snapkv")
@dataclass(frozen=True)
class SnapKV:
    """Keys that the newest queries look at, and their neighbours.

    With a_ti the attention of query t on key i, s_i = mean over the group, the `window` newest queries and the `kernel`
    keys around i of a_ti. The window's own tokens stay; where fewer tokens may stay than the window has (a prompt shorter
    than the window, for example), the newest do.

    Args:
        window: newest queries, 1 or more.
        kernel: width of the mean over neighbours, odd.
    Source: Li et al. 2024, arXiv:2404.14469.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1:
            raise OptionError(f"window={self.window} is not allowed; it counts tokens, 1 or more")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise OptionError(f"kernel={self.kernel} is not allowed; it counts a key and its neighbours on both sides: odd")

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        weights = ctx.mean_over_group(ctx.attention(self.window)).sum(-2) / self.window
        line = Line.of(ctx)
        place = torch.arange(line.size, device=line.device)
        older = line.take(weights.float()).masked_fill(place >= line.counts - self.window, 0)
        pooled = F.avg_pool1d(older, self.kernel, stride=1, padding=self.kernel // 2)
        return must_stay(line.put(pooled), ctx, recent=self.window)


@base("pyramidkv")
def _pyramidkv(window: int = 64, kernel: int = 5, beta: float = 20.0) -> Press:
    """SnapKV's scores, with more keys in the first layers and fewer in the last.

    Args:
        window, kernel: see `SnapKV`.
        beta: the last layer keeps the mean budget divided by this; 1 or more.
    Source: Cai et al. 2024, arXiv:2406.02069.
    """
    return Press(scorer=SnapKV(window, kernel), budget=Pyramid(window, beta))


@scorer("tova")
@dataclass(frozen=True)
class Tova:
    """Keys that the newest query looks at: s_i is the mean of its attention over all heads, so heads keep the same tokens.

    The newest token stays.

    Source: Oren et al. 2024, arXiv:2401.06104.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    window: ClassVar[int] = 1

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        line = Line.of(ctx)  # heads may store different tokens after an earlier compression; then the order counts
        weights = line.take(ctx.mean_over_group(ctx.attention(1))[..., 0, :].float())
        shared = weights.mean(1, keepdim=True).expand(ctx.stored.shape)
        return must_stay(line.put(shared.contiguous()), ctx, recent=1)


@scorer("observed_attention")
@dataclass(frozen=True)
class ObservedAttention:
    """Keys that have received much attention: s_i = mean over the group and the queries that see key i of a_ti.

    Attention is computed anew in blocks of queries, so any attention implementation will do. While decoding, the queries
    are the buffered ones.

    Source: Zhang et al. 2023 (H2O), arXiv:2306.14048, with the mean in place of the sum.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        total, queries = received(ctx)
        return total / queries.clamp(min=1)


def received(ctx: ScoreContext) -> tuple[Tensor, Tensor]:
    """Attention that each stored key got from the queries at hand.

    Returns:
        its sum over them, mean of the group, [B, Hkv, S] float32; and how many of them see the key, [B, Hkv or 1, S].
    """
    stored = ctx.stored
    total = torch.zeros(stored.shape, device=stored.keys.device)
    count = stored.positions.new_zeros(stored.shape[0], stored.positions.shape[1], stored.shape[2])
    block = max(_BLOCK // stored.shape[2], 1)
    for start in range(0, ctx.queries.shape[2], block):
        part = slice(start, start + block)
        positions = ctx.query_positions[:, part]
        real = None if ctx.query_real is None else ctx.query_real[:, part]
        some = replace(ctx, queries=ctx.queries[:, :, part], query_positions=positions, query_real=real)
        total += ctx.mean_over_group(some.attention(block)).sum(-2)
        sees = stored.positions[:, :, None, :] <= positions[:, None, :, None]
        count += (sees if real is None else sees & real[:, None, :, None]).sum(-2)
    return total, count
