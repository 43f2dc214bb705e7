"""Running mean and covariance of queries before rotation, for each row and head."""

from collections.abc import Callable

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS, check_dtype, dims
from attnkit._core.errors import InputError, OptionError, ShapeError

__all__ = ["QueryMoments"]

CHUNK = 4096  # queries of a row that are widened at once


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

    def update(
        self,
        queries: Tensor,
        *,
        positions: Tensor | None = None,
        rotate: Callable[[Tensor, Tensor], Tensor] | None = None,
        real: Tensor | None = None,
    ) -> None:
        """Take in the queries of the next n tokens; in parts or at once, the moments are the same up to rounding.

        Args:
            queries: [B, H, n, D].
            positions: [B, n] or [n] ints, where they were rotated; goes with `rotate`.
            rotate: (x [B, H, n, D], positions) -> x turned by those positions, as the model does it but for any factor on cos
                and sin; called with -positions, which takes the rotation back. None where queries were not rotated.
            real: [B, n] bool, False for padding; None means all tokens are real.
        Raises:
            ShapeError, DTypeError, InputError: an argument is wrong, or B, H or D differ from those before.
        """
        check_dtype("queries", queries, *FLOATS)
        sizes = dims(queries=(queries, "B H n D"), **({} if real is None else {"real": (real, "B n")}))
        if (positions is None) != (rotate is None):
            raise InputError("positions and rotate go together: the one says how far, the other how to turn back")
        batch, heads, tokens, width = (sizes[letter] for letter in ("B", "H", "n", "D"))
        if self.seen is None:
            self.seen = torch.zeros(batch, dtype=torch.long, device=queries.device)
            self.count = queries.new_zeros(batch, dtype=torch.float32)
            self.mean = queries.new_zeros(batch, heads, width, dtype=torch.float32)
            self.spread = queries.new_zeros(batch, heads, width, width, dtype=torch.float32)
        if self.mean.shape != (batch, heads, width):
            raise ShapeError(f"queries are of [B, H, D] = {(batch, heads, width)}, those before of {tuple(self.mean.shape)}")
        if real is None:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=queries.device)
        check_dtype("real", real, torch.bool)
        for start in range(0, tokens, CHUNK):
            part = slice(start, start + CHUNK)
            own = queries[:, :, part].float()
            if rotate is not None and positions is not None:
                own = rotate(own, -positions[..., part])
            self._take(own, real[:, part])

    def _take(self, queries: Tensor, real: Tensor) -> None:
        assert self.seen is not None
        index = self.seen[:, None] + real.cumsum(1)  # of each real token in its row, from 1
        taken = (real & (index > self.sinks)).float()
        self.seen = index[:, -1]
        count = taken.sum(1)
        weight = taken[:, None, :, None]
        queries = torch.where(weight > 0, queries, 0)  # padding may hold anything
        mean = queries.sum(2) / count.clamp(min=1)[:, None, None]
        centred = (queries - mean[:, :, None]) * weight
        self._merge(count, mean, centred.mT @ centred)

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
