"""Scorers from matrix sketching: how far a key stands out of the span of the others, with or without attention."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit._core.checks import check_choice
from attnkit._core.errors import OptionError, PolicyError
from attnkit.kv.context import ScoreContext
from attnkit.kv.line import Line, must_stay, standardised
from attnkit.kv.registry import scorer

__all__ = ["Cur", "Compactor", "LeverageScore", "NonCausalAttention", "unrotated"]

_TOKENS = 4096  # of which the attention inside chunks is there at a time
_RIDGE = 0.01
_TRIES = 5


@functools.cache
def _sketch(seed: int, width: int, rank: int, device: torch.device) -> Tensor:
    """[width, rank] float32, normal with variance 1 / rank; the same for all rows and heads."""
    phi: Tensor = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed)) * rank**-0.5
    return phi.to(device)


def unrotated(ctx: ScoreContext) -> Tensor:
    """Stored keys [B, Hkv, S, D] float32 as they were before their rotation."""
    keys = ctx.stored.keys.float()
    if ctx.rope is None:
        return keys
    padding = ctx.query_positions[:, -1:] - ctx.query_turned[:, -1:]  # what a row's places count beside its tokens
    back = (padding[..., None] - ctx.stored.positions).expand(ctx.stored.shape)
    turned = ctx.rope.rotate(keys.flatten(0, 1)[:, :, None], back.flatten(0, 1))[:, :, 0]
    turned[..., : 2 * ctx.rope.inv_freq.numel()] /= ctx.rope.attention_factor
    return turned.reshape(keys.shape)


@scorer("leverage_score")
@dataclass(frozen=True)
class LeverageScore:
    """Keys that stand out: statistical leverage of the keys as they were before their rotation.

    X = (K - mean K) Phi with Phi ~ N(0, 1 / sketch); s = diag(X (X^T X + 0.01 I)^-1 X^T), standardised over the heads and
    tokens of a row. All rows and heads share one Phi, drawn from the seed.

    Args:
        sketch: columns of Phi.
        seed: of Phi.
    Source: Chari & Van Durme 2025 (Compactor), arXiv:2507.08143.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rope"})
    sketch: int = 48
    seed: int = 0

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        return self.of(ctx, ctx.rank >= 0)

    def of(self, ctx: ScoreContext, mask: Tensor) -> Tensor:
        """Scores of the tokens where mask [B or 1, Hkv or 1, S] holds, among themselves; the others get anything."""
        keys = unrotated(ctx)
        inside = mask.expand(ctx.stored.shape)[..., None]
        counted = keys.masked_fill(~inside, 0)
        mean = counted.sum(2, keepdim=True) / inside.sum(2, keepdim=True).clamp(min=1)
        phi = _sketch(self.seed, keys.shape[-1], self.sketch, keys.device)
        x = ((counted - mean) @ phi).masked_fill(~inside, 0)
        solved: Tensor = torch.cholesky_solve(x.mT, _factor(x.mT @ x)).mT
        return standardised((x * solved).sum(-1).clamp(min=0), mask)


def _factor(gram: Tensor) -> Tensor:
    """Cholesky factor of `gram` [..., R, R] and a ridge: 0.01, or ten times more as often as rounding makes that fail."""
    eye = torch.eye(gram.shape[-1], device=gram.device)
    ridges = [torch.full(gram.shape[:-2], _RIDGE * 10.0**n, device=gram.device) for n in range(_TRIES)]
    ridges.append(_RIDGE + gram.diagonal(dim1=-2, dim2=-1).sum(-1))  # the trace is always enough
    ridge = torch.stack(ridges)[..., None, None]
    factors, info = torch.linalg.cholesky_ex((gram + gram.mT) / 2 + ridge * eye)  # all at once: a loop would wait for the GPU
    first = (info == 0).to(torch.int8).argmax(0)[None, ..., None, None]
    chosen: Tensor = factors.gather(0, first.expand(1, *gram.shape))[0]
    return chosen


@scorer("non_causal_attention")
@dataclass(frozen=True)
class NonCausalAttention:
    """Keys that get much attention from their surroundings, on both sides.

    Inside chunks of `chunk` tokens, a = softmax over the chunk's keys of q . k (no scale, no causal mask); column sums of a,
    mean of the group, times |v|, mean over three neighbours, standardised over the heads and tokens of a row. The last chunk
    may be short: what it lacks takes no part.

    Args:
        chunk: tokens.
    Source: Chari & Van Durme 2025 (Compactor), arXiv:2507.08143.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    chunk: int = 256

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise OptionError(f"chunk={self.chunk} is not allowed; it counts tokens, 1 or more")

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32.

        Raises:
            PolicyError: some stored key has no query, as while decoding.
        """
        return self.of(ctx, ctx.rank >= 0)

    def of(self, ctx: ScoreContext, mask: Tensor) -> Tensor:
        """Scores of the tokens where mask [B or 1, Hkv or 1, S] holds, among themselves; the others get anything."""
        if ctx.queries.shape[2] != ctx.stored.shape[2]:
            raise PolicyError(
                f"attention inside chunks needs the query of every stored key; here are {ctx.queries.shape[2]} queries and "
                f"{ctx.stored.shape[2]} keys; use this method on a whole prefill"
            )
        line = Line.of(ctx, mask)
        queries = line.take(ctx.queries.unflatten(1, (-1, ctx.groups)).transpose(2, 3))  # [B, Hkv, S, G, D]
        sums = self._columns(queries, line.take(ctx.stored.keys), line.live)
        sums = sums * line.take(ctx.stored.values).float().norm(dim=-1)
        return standardised(line.put(F.avg_pool1d(sums, 3, stride=1, padding=1)), mask)

    def _columns(self, queries: Tensor, keys: Tensor, live: Tensor) -> Tensor:
        size = keys.shape[2]
        many = max(_TOKENS // self.chunk, 1) * self.chunk
        sums = []
        for start in range(0, size, many):
            part = slice(start, start + many)
            q, k = queries[:, :, part].float(), keys[:, :, part].float()
            seen = live[:, :, part].expand(*k.shape[:2], -1)
            fill = -k.shape[2] % self.chunk
            q, k, seen = F.pad(q, (0, 0, 0, 0, 0, fill)), F.pad(k, (0, 0, 0, fill)), F.pad(seen, (0, fill))
            q, k, seen = (x.unflatten(2, (-1, self.chunk)) for x in (q, k, seen))
            dots = torch.einsum("bhcqgd,bhckd->bhcgqk", q, k).masked_fill(~seen[:, :, :, None, None], -torch.inf)
            weights = dots.softmax(-1).masked_fill(~seen[:, :, :, None, :, None], 0)
            sums.append(weights.sum(-2).mean(3).flatten(2)[..., : min(many, size - start)])
        return torch.cat(sums, -1)


@scorer("compactor")
@dataclass(frozen=True)
class Compactor:
    """Leverage and attention inside chunks together: s = blending * leverage + non-causal attention.

    Both look at the tokens between the first `sink` and the last `recent`, which stay.

    Args:
        sink, recent: tokens.
        chunk, sketch, seed: see `NonCausalAttention` and `LeverageScore`.
        blending: weight of the leverage; None is the press's ratio.
    Source: Chari & Van Durme 2025, arXiv:2507.08143.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries", "rope"})
    sink: int = 8
    recent: int = 4
    chunk: int = 256
    sketch: int = 48
    blending: float | None = None
    seed: int = 0

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        length = ctx.stored.length
        end = length if isinstance(length, int) else length[..., None]
        middle = (ctx.rank >= self.sink) & (ctx.rank < end - self.recent)
        leverage = LeverageScore(self.sketch, self.seed).of(ctx, middle)
        attention = NonCausalAttention(self.chunk).of(ctx, middle)
        scores = (ctx.ratio if self.blending is None else self.blending) * leverage + attention
        return must_stay(scores, ctx, sink=self.sink, recent=self.recent)


@scorer("cur")
@dataclass(frozen=True)
class Cur:
    """Tokens whose keys and values are long, compared with their neighbours: leverage as in a CUR decomposition.

    With l(x)_i = |x_i|^2 over its sum in the window of `local` tokens, s is l(k) l(v), l(k), l(v) or their mean, divided by
    the sum over all tokens.

    Args:
        sink: tokens at the beginning that stay.
        leverage: "kv_product", "key", "value" or "kv_avg".
        local: tokens a window; None takes |x_i|^2 as it is.
        sketch: columns of a random projection of keys and values before all this; None is none.
        seed: of the projection.
    Source: Sengupta et al. 2025 (CurDKV), arXiv:2509.15038.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    sink: int = 4
    leverage: str = "kv_product"
    local: int | None = 16
    sketch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("leverage", self.leverage, ("kv_product", "key", "value", "kv_avg"))

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        line = Line.of(ctx)
        key, value = (self._share(line.take(states).float()) for states in (ctx.stored.keys, ctx.stored.values))
        forms = {"kv_product": key * value, "key": key, "value": value, "kv_avg": (key + value) / 2}
        scores = _over_sum(forms[self.leverage].masked_fill(~line.live, 0))
        return must_stay(line.put(scores), ctx, sink=self.sink)

    def _share(self, states: Tensor) -> Tensor:
        if self.sketch is not None:
            states = states @ _sketch(self.seed, states.shape[-1], self.sketch, states.device)
        square = states.square().sum(-1)
        if self.local is None:
            return square
        size = square.shape[-1]
        return _over_sum(F.pad(square, (0, -size % self.local)).unflatten(-1, (-1, self.local))).flatten(2)[..., :size]


def _over_sum(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
