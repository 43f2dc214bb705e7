"""Running mean and covariance of queries before rotation, for each row and head."""

from collections.abc import Callable

import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.checks import dims
from attnkit._core.errors import InputError, OptionError, ShapeError

__all__ = ["QueryMoments"]

SAMPLE = 256  # tokens whose mean is near enough to that of all: products of what is left lose nothing


class QueryMoments:
    """Count, mean and centred second moment of the queries of a layer, in float32, merged as they come.

    Args:
        sinks: the first so many real tokens of each row are left out: what they ask for is unlike all later queries.

    Attributes:
        seen: [B] int64, real tokens of each row so far, those left out included; None before the first update.
        count: [B] float32, tokens in the moments.
        mean: [B, H, D] float32, 0 where there is none.
        spread: [B, H, D, D] float32, the sum of outer products of what queries differ from their mean by.

    Source: Chan, Golub and LeVeque 1983 for the merge.
    """

    def __init__(self, *, sinks: int = 4) -> None:
        if sinks < 0:
            raise OptionError(f"sinks={sinks} is below 0")
        self.sinks = sinks
        self.seen: Tensor | None = None
        self.count = self.mean = self.spread = torch.empty(0)

    @torch.no_grad()
    def update(
        self,
        queries: Tensor,
        *,
        positions: Tensor | None = None,
        inv_freq: Tensor | None = None,
        interleaved: bool = False,
        real: Tensor | None = None,
    ) -> None:
        """Take in the queries of the next n tokens; in parts or at once, the moments are the same up to rounding.

        Args:
            queries: [B, H, n, D].
            positions, inv_freq, interleaved: [B, n] or [n] ints, where they were rotated to, and how, as of
                `attnkit.ops.query_moments`; any factor on cos and sin stays in the moments.
            real: [B, n] bool, False for padding; None means all tokens are real.
        Raises:
            ShapeError, DTypeError, InputError: an argument is wrong, or B, H or D differ from those before.
        """
        sizes = dims(queries=(queries, "B H n D"), **({} if real is None else {"real": (real, "B n")}))
        batch, heads, tokens, width = (sizes[letter] for letter in ("B", "H", "n", "D"))
        if self.seen is not None and self.mean.shape != (batch, heads, width):
            raise ShapeError(f"queries are of [B, H, D] = {(batch, heads, width)}, those before of {tuple(self.mean.shape)}")
        seen = torch.zeros(batch, dtype=torch.long, device=queries.device) if self.seen is None else self.seen
        q = queries.transpose(1, 2)
        if inv_freq is not None:
            inv_freq = inv_freq.to(q.device)
        step = max(1, -(-tokens // SAMPLE))
        sampled = slice(step - 1, None, step)
        some, level, _ = ops.query_moments(
            q[:, sampled],
            inv_freq=inv_freq,
            positions=None if positions is None else positions[..., sampled],
            interleaved=interleaved,
            real=None if real is None else real[:, sampled],
        )
        shift = level / some.clamp(min=1)[:, None, None]
        count, sums, products = ops.query_moments(
            q,
            inv_freq=inv_freq,
            positions=positions,
            interleaved=interleaved,
            real=real,
            skip=(self.sinks - seen).clamp(min=0),
            shift=shift,
        )
        apart = sums / count.clamp(min=1)[:, None, None]
        mean = torch.where(count[:, None, None] > 0, shift + apart, 0)
        spread = torch.addcmul(products, sums[..., :, None], apart[..., None, :], value=-1)
        spread = torch.where(count[:, None, None, None] > 1, spread, 0)  # one alone leaves its rounding
        if self.seen is None:
            self.count, self.mean, self.spread = count.float(), mean.float(), spread.float()
        else:
            self._merge(count.float(), mean.float(), spread.float())
        self.seen = seen + (tokens if real is None else real.sum(1))

    def _merge(self, count: Tensor, mean: Tensor, spread: Tensor) -> None:
        total = self.count + count
        share = (count / total.clamp(min=1))[:, None, None]
        apart = mean - self.mean
        between = (self.count[:, None, None] * share)[..., None] * apart[..., :, None] * apart[..., None, :]
        self.spread = self.spread + spread + between
        self.mean = self.mean + share * apart
        self.count = total

    def merge(self, other: "QueryMoments") -> None:
        """Take in the moments of other tokens of the same rows, whose own sinks they have left out.

        Raises:
            ShapeError: B, H or D differ.
        """
        if other.seen is None:
            return
        if self.seen is None:
            self.seen, self.count, self.mean, self.spread = other.seen, other.count, other.mean, other.spread
            return
        if self.mean.shape != other.mean.shape:
            raise ShapeError(f"moments are of [B, H, D] = {tuple(self.mean.shape)} and {tuple(other.mean.shape)}")
        self._merge(other.count, other.mean, other.spread)
        self.seen = self.seen + other.seen

    def covariance(self, *, correction: int = 0) -> Tensor:
        """[B, H, D, D]: the spread over N - correction tokens (0 as in the paper's code, 1 unbiased), 0 where that leaves none.

        Raises:
            InputError: nothing was taken in yet.
            OptionError: a correction other than 0 and 1.
        """
        if self.seen is None:
            raise InputError("covariance() needs queries; call update() first")
        if correction not in (0, 1):
            raise OptionError(f"correction={correction} is not allowed; choose one of 0, 1")
        return self.spread / (self.count - correction).clamp(min=1)[:, None, None, None]

    def rows(self, change: Callable[[Tensor], Tensor]) -> "QueryMoments":
        """The moments of a batch whose rows were reordered, repeated or selected."""
        other = QueryMoments(sinks=self.sinks)
        if self.seen is not None:
            other.seen, other.count, other.mean, other.spread = map(change, (self.seen, self.count, self.mean, self.spread))
        return other
