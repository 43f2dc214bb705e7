"""Few keys that attend like all of them."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype
from attnkit._core.errors import OptionError
from attnkit.kv.compaction import fit_attention
from attnkit.kv.context import ScoreContext, Stored
from attnkit.kv.pressing import Press
from attnkit.kv.registry import base
from attnkit.kv.selectors import Kept

__all__ = ["MatchAttention", "RootMeanSquare"]


def _scores(ctx: ScoreContext, window: int, head: int) -> tuple[Tensor, Tensor]:
    """Of one key head: scaled scores [B, G w, S] of the newest queries, each seeing all real keys, and [B, G w] which count."""
    stored = ctx.stored
    queries = ctx.queries[:, head * ctx.groups : (head + 1) * ctx.groups, -window:]
    acc = accumulator_dtype(queries.dtype)
    scores = queries.to(acc) @ stored.keys[:, head, None].to(acc).mT * ctx.scale
    if ctx.softcap is not None:
        scores = ctx.softcap * torch.tanh(scores / ctx.softcap)
    if stored.bias is not None:
        scores = scores + stored.bias[:, head, None, None]
    if stored.real is not None:
        real = stored.real.expand(stored.shape)[:, head, None, None]
        scores = scores.masked_fill(~real, -torch.inf)
    asked = torch.ones_like(scores[..., 0], dtype=torch.bool)
    if ctx.query_real is not None:
        asked = asked & ctx.query_real[:, None, -window:].bool()
    return scores.flatten(1, 2), asked.flatten(1)


@dataclass(frozen=True)
class RootMeanSquare:
    """Root mean square, over the queries of a group, of the attention that they would give each key if they came last.

    Args:
        window: newest queries, which stand for those to come.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    window: int = 256

    def __post_init__(self) -> None:
        if self.window < 1:
            raise OptionError(f"window={self.window} is not allowed; it counts queries, 1 or more")

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        return torch.stack([self._head(ctx, head) for head in range(ctx.stored.shape[1])], dim=1)

    def _head(self, ctx: ScoreContext, head: int) -> Tensor:
        scores, asked = _scores(ctx, self.window, head)
        prob = torch.softmax(scores, -1).nan_to_num(0.0) * asked[..., None]
        return (prob.square().sum(1) / asked.sum(-1, keepdim=True).clamp(min=1)).sqrt().float()


@dataclass(frozen=True)
class MatchAttention:
    """Kept keys get a bias, and values that make up for those that are gone.

    Args:
        window: newest queries, for which attention shall be as before.
        ridge: how strongly values hold on to their own.
    """

    window: int
    ridge: float

    def change(self, ctx: ScoreContext, scores: Tensor, kept: Kept) -> Stored:
        """The stored tokens with other values and biases."""
        del scores
        stored, live = ctx.stored, kept.live()
        values = stored.values.clone()
        bias = torch.zeros(stored.shape, device=values.device) if stored.bias is None else stored.bias.clone()
        for head in range(stored.shape[1]):  # one by one: the fit is as large as its probabilities
            seen, asked = _scores(ctx, self.window, head)
            index, here = kept.index[:, head], live[:, head]
            fitted, added = fit_attention(seen, stored.values[:, head], index, live=here, asked=asked, ridge=self.ridge)
            # entries that do not count may name tokens that do: they write behind the end
            place = torch.where(here, index, stored.shape[2])
            values[:, head] = _put(values[:, head], place, fitted)
            bias[:, head] = _put(bias[:, head], place, bias[:, head].gather(1, index) + added.float())
        return replace(stored, values=values, bias=bias)


def _put(states: Tensor, place: Tensor, new: Tensor) -> Tensor:
    """States [B, S, ...] with `new` [B, t, ...] at `place` [B, t]; what goes to S is lost."""
    longer = torch.cat([states, states[:, :1]], dim=1)
    at = place if states.dim() == 2 else place[..., None].expand_as(new)
    return longer.scatter(1, at, new.to(states.dtype))[:, :-1]


@base("attention_matching")
def _attention_matching(window: int = 256, ridge: float = 1e-3) -> Press:
    """Keep the keys with the most attention, give them biases and refitted values, so that attention is nearly as before.

    The newest queries stand for those to come. Biases keep each query's mass, values its output; see
    `attnkit.kv.match_attention`. Meant for few keys: the fit of a head that keeps t of them takes t^2 numbers in float64 and
    t^3 operations.

    Args:
        window: newest queries.
        ridge: how strongly values hold on to their own, above 0.
    Source: Attention Matching 2026, arXiv:2602.16284.
    """
    if not ridge > 0:
        raise OptionError(f"ridge={ridge} is not allowed; give a number above 0")
    scorer: Any = RootMeanSquare(window)
    return Press(scorer, transform=MatchAttention(window, ridge))
