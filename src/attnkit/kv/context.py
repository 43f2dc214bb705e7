"""What a press may look at when it decides which keys stay."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from attnkit._core.checks import accumulator_dtype

__all__ = ["LayerCall", "Rotation", "ScoreContext", "Stored"]


class Rotation(Protocol):
    """The rotary embedding of a model, as `attnkit.inference.RopeSpec` offers it."""

    @property
    def inv_freq(self) -> Tensor: ...  # noqa: D102

    @property
    def attention_factor(self) -> float: ...  # noqa: D102

    @property
    def interleaved(self) -> bool | None: ...  # noqa: D102

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x [B, T, H, D] by positions [T] or [B, T]; negative ones turn back. The attention factor is not applied."""
        ...


class LayerCall(Protocol):
    """What a press needs of one layer's attention call; `attnkit.inference.call.LayerCall` is one.

    Attributes:
        q: [B, T, H, D], the new queries, rotated.
        scale, softcap, padding, seen, first, layer, rope: as there.
        turned: [B or 1, T] int64, the positions that the queries were rotated to.
        module: the layer's attention module.
        index: the layer's number.
        hidden: [B, T, width] what went into the attention module, where the press needs it.
    """

    q: Tensor
    scale: float | None
    softcap: float | None
    padding: Any
    seen: int
    turned: Tensor | None
    layer: Any
    rope: Any
    module: Any
    hidden: Tensor | None

    @property
    def first(self) -> int: ...  # noqa: D102

    @property
    def index(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Stored:
    """The keys of one layer, laid side by side.

    Attributes:
        keys, values: [B, Hkv, S, D] and [B, Hkv, S, Dv].
        positions: [B, Hkv or 1, S] int64, ascending where real: the index in its row (padding counted) of each token.
        real: [B, Hkv or 1, S] bool, False for padding and for the gaps behind shorter heads; None when all are real.
        bias: [B, Hkv, S] float32, added to the scaled scores; None is zero.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    real: Tensor | None = None
    bias: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[B, Hkv, S]."""
        return self.keys.shape[:3]

    @property
    def length(self) -> int | Tensor:
        """Real tokens a head: [B, Hkv] int64, or one number where all are."""
        return self.shape[2] if self.real is None else self.real.sum(-1).expand(self.shape[:2])


@dataclass(frozen=True)
class ScoreContext:
    """One layer at the moment of compression: what a scorer may use.

    Attributes:
        stored: the keys that are there.
        queries: [B, H, w, D], the newest w queries that were kept, rotated; w is at most what the press asked for.
        query_positions: [B or 1, w] int64, their places in their rows.
        query_real: [B, w] bool, which of them are real tokens; None when all are.
        query_turned: [B or 1, w] int64, the positions that they were rotated to (padding is not counted, as a rule).
        moments: mean and covariance of unrotated queries (`kv.moments.QueryMoments`), where asked for: of the context's,
            while decoding of those that were kept.
        hidden: [B, w', width] what went into the attention module in the same passes, where asked for.
        seen: tokens that the row has seen (padding counted).
        index, layers: the layer's number, and how many there are.
        module: the attention module.
        scale: of the scores.
        softcap: of the scores.
        rope: the model's rotation; None where the press does not ask for it.
        ratio: the fraction that the press removes.
        phase: "prefill" or "decode".
        memory: what the scorer left there the last time it saw this layer; tensors have rows first.
    """

    stored: Stored
    queries: Tensor
    query_positions: Tensor
    query_real: Tensor | None
    query_turned: Tensor
    moments: Any
    hidden: Tensor | None
    seen: int
    index: int
    layers: int
    module: Any
    scale: float
    softcap: float | None
    rope: Rotation | None
    ratio: float
    phase: str
    memory: dict[str, Tensor] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """Query heads a key head."""
        return self.queries.shape[1] // self.stored.keys.shape[1]

    @property
    def next_turned(self) -> Tensor:
        """[B or 1] int64: the position that the next query will be rotated to."""
        return self.query_turned[:, -1] + 1

    @cached_property
    def rank(self) -> Tensor:
        """[B, Hkv or 1, S] int64: the place of each stored token among the real ones of its head; padding has -1."""
        real = self.stored.real
        if real is None:
            return torch.arange(self.stored.shape[2], device=self.stored.keys.device)[None, None]
        return (real.cumsum(-1) - 1).masked_fill(~real, -1)

    def restricted(self, index: Tensor, live: Tensor) -> "ScoreContext":
        """The layer with some of its tokens only.

        Args:
            index: [B, Hkv, M] int64 into the stored tokens, ascending.
            live: [B, Hkv, M] bool, which entries of `index` count.
        """
        stored = self.stored
        heads = index.shape[1]
        some = Stored(
            keys=stored.keys.gather(2, index[..., None].expand(-1, -1, -1, stored.keys.shape[-1])),
            values=stored.values.gather(2, index[..., None].expand(-1, -1, -1, stored.values.shape[-1])),
            positions=stored.positions.expand(-1, heads, -1).gather(-1, index),
            real=live,
            bias=None if stored.bias is None else stored.bias.gather(-1, index),
        )
        return replace(self, stored=some)

    def mean_over_group(self, x: Tensor) -> Tensor:
        """[B, H, ...] -> [B, Hkv, ...]: the mean over the query heads that share a key head."""
        mean: Tensor = x.unflatten(1, (-1, self.groups)).mean(2)
        return mean

    def attention(self, window: int) -> Tensor:
        """[B, H, w, S] float32: what the newest `window` queries give each stored key, themselves included.

        A query sees real keys up to its own position. Rows of padding are zero.
        """
        queries, positions = self.queries[:, :, -window:], self.query_positions[:, -window:]
        stored = self.stored
        acc = accumulator_dtype(queries.dtype)
        grouped = queries.unflatten(1, (-1, self.groups)).to(acc)
        scores = torch.einsum("bhgwd,bhsd->bhgws", grouped, stored.keys.to(acc)) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if stored.bias is not None:
            scores = scores + stored.bias[:, :, None, None]
        seen = stored.positions[:, :, None, :] <= positions[:, None, :, None]
        if stored.real is not None:
            seen = seen & stored.real[:, :, None, :]
        weights = torch.softmax(scores.masked_fill(~seen[:, :, None], -torch.inf), -1)
        weights = torch.nan_to_num(weights, nan=0.0).flatten(1, 2)
        if self.query_real is not None:
            weights = weights * self.query_real[:, None, -window:, None]
        return weights
