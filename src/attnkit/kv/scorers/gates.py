"""Scorers that were trained to foretell, from hidden states, what an expensive method would say of a token."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from attnkit._core.errors import PolicyError, ShapeError
from attnkit.kv.budgets_joint import AcrossLayers
from attnkit.kv.context import ScoreContext
from attnkit.kv.line import must_stay
from attnkit.kv.pressing import Press
from attnkit.kv.registry import base, scorer
from attnkit.kv.weights import device_copy, required, tensors

__all__ = ["FastKVzip", "KVzap"]


def _of_stored(ctx: ScoreContext, new: Tensor, method: str) -> Tensor:
    """Scores of the stored tokens [B, Hkv, S], from those of the newest w tokens [B, Hkv, w] and those remembered.

    Raises:
        PolicyError: there are tokens between them, whose hidden states are gone.
    """
    held: Tensor | None = ctx.memory.get(method)
    first = ctx.seen - new.shape[-1]
    known = 0 if held is None else held.shape[-1]
    if known < first:
        raise PolicyError(
            f"{method} judges tokens by their hidden states, and those of tokens {known} to {first - 1} are gone; let it judge "
            f"at the end of the prefill too (dms:{method}), at least once in `buffer` tokens"
        )
    scores = new if held is None else torch.cat([held[..., :first], new], dim=-1)
    ctx.memory[method] = scores
    return scores.gather(-1, ctx.stored.positions.expand(ctx.stored.shape).clamp(0, ctx.seen - 1))


def _hidden(ctx: ScoreContext) -> Tensor:
    assert ctx.hidden is not None  # `needs` asks for it
    return ctx.hidden.float()


@scorer("kvzap")
@dataclass(frozen=True)
class KVzap:
    """A trained surrogate reads a token's hidden state and foretells log KVzip+ of its key: s = g_layer(h).

    g is linear or has one hidden layer with GELU, whichever the weights are of. Meant for "dms:kvzap", where a threshold
    decides in prefill and decoding.

    Args:
        weights: safetensors with `layers.{i}.weight` [Hkv, width] and `.bias`, or `layers.{i}.0.*` and `layers.{i}.2.*`, as
            published for some models.
    Source: Jegou and Jeblick 2026 (KVzap), arXiv:2601.07891.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    weights: str | None = None

    def __post_init__(self) -> None:
        required(self.weights, "kvzap", "weights, the safetensors file of a surrogate trained for this model")

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32.

        Raises:
            ShapeError: the surrogate is another model's.
            PolicyError: hidden states of stored tokens are gone.
        """
        hidden = _hidden(ctx)
        stem = f"layers.{ctx.index}"
        deep = f"{stem}.2.weight" in tensors(str(self.weights))
        last = f"{stem}.2" if deep else stem
        if deep:
            hidden = F.gelu(self._linear(hidden, f"{stem}.0"))
        new = self._linear(hidden, last).transpose(1, 2)
        if new.shape[1] != ctx.stored.shape[1]:
            raise ShapeError(f"{self.weights} scores {new.shape[1]} key heads; this model has {ctx.stored.shape[1]}")
        return _of_stored(ctx, new, "kvzap")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (device_copy(str(self.weights), f"{name}.{part}", x.device) for part in ("weight", "bias"))
        if weight.shape[1] != x.shape[-1]:
            raise ShapeError(
                f"{self.weights}: {name}.weight has shape {tuple(weight.shape)}; hidden states are {x.shape[-1]} wide"
            )
        return F.linear(x, weight, bias)


@dataclass(frozen=True)
class FastKVzip:
    """A trained gate of low rank compares a token with learnt sinks, as attention would.

    q = RMSNorm(W_q h + b_q) [Hkv, G, d], k = RMSNorm(W_k h) [Hkv, d] and, for a group, s = mean_g of
    1 / (1 + sum_j exp(c_j q_g / sqrt(d) - k q_g / sqrt(d) - b_g)) over the learnt sinks c_j.
    The first tokens and the newest ones (a fiftieth; of long texts a fixed number) stay.

    Args:
        weights: safetensors with `layers.{i}.` and q_proj.weight [Hkv G d, width], q_proj.bias, k_proj.weight [Hkv d, width],
            q_norm.weight [d], k_norm.weight [d], k_base [Hkv, 1, sinks, d], b [Hkv, 1, G].
        sink: first tokens that stay.
        recent: the fraction of newest tokens that stay, of fewer than 32,000.
        recent_long: newest tokens that stay, of 32,000 and more.
    Source: Kim et al. 2026 (Fast KVzip), arXiv:2601.17668.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    weights: str | None = None
    sink: int = 4
    recent: float = 0.02
    recent_long: int = 4096

    def __post_init__(self) -> None:
        required(self.weights, "fastkvzip", "weights, the safetensors file of gates trained for this model")

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32.

        Raises:
            ShapeError: the gates are another model's.
            PolicyError: hidden states of stored tokens are gone.
        """
        scores = _of_stored(ctx, self._gate(ctx), "fastkvzip")
        length = torch.as_tensor(ctx.stored.length, device=scores.device).expand(scores.shape[:2])
        newest = (length.double() * self.recent).long().clamp(min=1)
        newest = torch.where(length < 32_000, newest, self.recent_long)
        return must_stay(scores, ctx, sink=self.sink, recent=newest[..., None])

    def _gate(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, w] float32."""
        hidden = _hidden(ctx)
        part = {
            name: device_copy(str(self.weights), f"layers.{ctx.index}.{name}", hidden.device)
            for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "q_norm.weight", "k_norm.weight", "k_base", "b")
        }
        heads, group, width = part["b"].shape[0], part["b"].shape[-1], part["q_norm.weight"].shape[-1]
        if heads != ctx.stored.shape[1] or part["q_proj.weight"].shape != (heads * group * width, hidden.shape[-1]):
            raise ShapeError(
                f"{self.weights} has {heads} key heads and gates {tuple(part['q_proj.weight'].shape)}; this model has "
                f"{ctx.stored.shape[1]} key heads and hidden states {hidden.shape[-1]} wide"
            )
        q = F.linear(hidden, part["q_proj.weight"], part["q_proj.bias"]).unflatten(-1, (heads, group, width))
        k = F.linear(hidden, part["k_proj.weight"]).unflatten(-1, (heads, width))
        q = F.rms_norm(q, (width,), part["q_norm.weight"], 1e-6) * width**-0.5
        k = F.rms_norm(k, (width,), part["k_norm.weight"], 1e-6)
        own = torch.einsum("bthgd,bthd->bthg", q, k) + part["b"][:, 0]
        sinks = torch.einsum("bthgd,hsd->bthgs", q, part["k_base"][:, 0]).logsumexp(-1)
        return torch.sigmoid(own - sinks).mean(-1).transpose(1, 2)


@base("fastkvzip")
def _fastkvzip(weights: str | None = None, sink: int = 4, recent: float = 0.02, recent_long: int = 4096) -> Press:
    """A trained gate of low rank compares a token with learnt sinks; see `FastKVzip`.

    Source: Kim et al. 2026 (Fast KVzip), arXiv:2601.17668.
    """
    return Press(scorer=FastKVzip(weights, sink, recent, recent_long), budget=AcrossLayers())
