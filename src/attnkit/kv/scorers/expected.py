"""Scorers that ask what queries to come will look at."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit import ops
from attnkit._core.checks import check_choice
from attnkit._core.errors import OptionError, ShapeError, UnsupportedArchitecture
from attnkit.kv.context import ScoreContext
from attnkit.kv.expected import expected_attention_scores
from attnkit.kv.line import must_stay
from attnkit.kv.registry import scorer
from attnkit.kv.weights import device_copy, required

__all__ = ["CapKV", "ExpectedAttention", "ExpectedAttentionStats"]


def _to_come(
    ctx: ScoreContext, mean: Tensor, cov: Tensor | None, *, horizon: int, rope: str = "mean"
) -> tuple[Tensor, Tensor | None]:
    """Moments [B, H, D] and [B, H, D, D] of the queries of the next `horizon` positions."""
    if ctx.rope is None:
        return mean, cov
    odd = mean.shape[-1] % 2  # a channel of zeros makes pairs of all
    if odd:
        mean, cov = F.pad(mean, (0, 1)), None if cov is None else F.pad(cov, (0, 1, 0, 1))
    mean, cov = ops.future_query_moments(
        mean,
        cov,
        inv_freq=ctx.rope.inv_freq.to(mean.device),
        start=ctx.next_turned.expand(mean.shape[0]),
        horizon=horizon,
        rope=rope,  # the attention factor is in the moments already: turning queries back leaves it there
        interleaved=bool(ctx.rope.interleaved),
    )
    return (mean[..., :-1], None if cov is None else cov[..., :-1, :-1]) if odd else (mean, cov)


def _output_gram(ctx: ScoreContext) -> Tensor:
    """[H, Dv, Dv]: W_h^T W_h of each query head's part of the output projection."""
    weight = getattr(getattr(ctx.module, "o_proj", None), "weight", None)
    heads, width = ctx.queries.shape[1], ctx.stored.values.shape[-1]
    if weight is None or weight.dim() != 2 or weight.shape[1] != heads * width:
        raise UnsupportedArchitecture(
            f"value_norm='output' needs {type(ctx.module).__name__}.o_proj, a linear layer of {heads} heads of width {width}; "
            f"use value_norm='l2'"
        )
    parts: Tensor = weight.detach().float().unflatten(1, (heads, width)).transpose(0, 1)  # [H, width of the model, Dv]
    return parts.mT @ parts


@scorer("expected_attention")
@dataclass(frozen=True)
class ExpectedAttention:
    """Keys that queries to come are expected to look at, times the size of their values.

    The queries of the context, before rotation and without sinks, have mean mu and covariance C; rotated to the next `horizon`
    positions they have mu' and C'. a = softmax over keys of mu' . k / sqrt(D) + k . C' k / (2 D), mean of the group, and
    s = (a + eps) |v|. The first `sinks` tokens stay. While decoding, the moments are those of the buffered queries, at the
    positions that they and the queries to come really have. A soft cap of scores is not taken into account.

    Args:
        horizon: positions to come.
        sinks: first tokens of a row: they stay, and their queries do not count.
        eps: added to every probability.
        rope: "moment" keeps the variance that rotation adds, "mean" is the paper's formula.
        covariance: whether the second term is there.
        value_norm: "l2" is |v|, "output" is |W_o v| with the part of the output projection that belongs to the query head,
            "none" is 1.
    Source: Devoto et al. 2025, arXiv:2510.00636.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"moments", "rope"})
    horizon: int = 512
    sinks: int = 4
    eps: float = 0.0
    rope: str = "moment"
    covariance: bool = True
    value_norm: str = "l2"

    def __post_init__(self) -> None:
        check_choice("rope", self.rope, ("moment", "mean"))
        check_choice("value_norm", self.value_norm, ("l2", "output", "none"))
        if self.horizon < 1 or self.sinks < 0:
            raise OptionError(
                f"horizon={self.horizon}, sinks={self.sinks} is not allowed; they count tokens, 1 or more and 0 or more"
            )

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        return self.of(ctx, ctx.moments.mean, ctx.moments.covariance() if self.covariance else None)

    def of(self, ctx: ScoreContext, mean: Tensor, cov: Tensor | None) -> Tensor:
        """Scores for queries of mean [B, H, D] and covariance [B, H, D, D] before rotation."""
        mean, cov = _to_come(ctx, mean, cov, horizon=self.horizon, rope=self.rope)
        stored = ctx.stored
        scores = expected_attention_scores(
            stored.keys,
            stored.values,
            mean,
            cov,
            scale=ctx.scale,
            eps=self.eps,
            value_norm=self.value_norm,
            output_gram=_output_gram(ctx) if self.value_norm == "output" else None,
            valid=None if stored.real is None else stored.real.expand(stored.shape),
            sinks=self.sinks,
        )
        return must_stay(scores.float(), ctx, sink=self.sinks)


@scorer("expected_attention_stats")
@dataclass(frozen=True)
class ExpectedAttentionStats(ExpectedAttention):
    """Expected attention with moments of queries that were learnt beforehand, instead of the context's own.

    Args:
        stats: path of a safetensors file with "query_mean" [layers, H, D] and "query_cov" [layers, H, D, D], of queries before
            rotation.
        horizon, sinks, eps, rope, covariance, value_norm: see `ExpectedAttention`.
    Raises:
        OptionError: no path.
    Source: Devoto et al. 2025, arXiv:2510.00636.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rope"})
    stats: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        required(self.stats, "expected_attention_stats", "stats, moments that attnkit.inference.calibrate learns of the model")

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32.

        Raises:
            InputError: the file has other tensors.
            ShapeError: the moments were learnt on another model.
        """
        rows, device = ctx.stored.shape[0], ctx.stored.keys.device
        mean, cov = (device_copy(str(self.stats), name, device) for name in ("query_mean", "query_cov"))
        expected = (ctx.layers, ctx.queries.shape[1], ctx.stored.keys.shape[-1])
        if tuple(mean.shape) != expected or tuple(cov.shape) != (*expected, expected[-1]):
            raise ShapeError(
                f"stats has means of shape {tuple(mean.shape)} and covariances of {tuple(cov.shape)}; the model has "
                f"{expected} (layers, query heads, width)"
            )
        own, spread = mean[ctx.index][None], cov[ctx.index][None]
        around = spread.expand(rows, -1, -1, -1).contiguous() if self.covariance else None
        return self.of(ctx, own.expand(rows, -1, -1).contiguous(), around)


@scorer("capkv")
@dataclass(frozen=True)
class CapKV:
    """Tokens that lie along the queries to come and whose values stand out.

    With q the mean query of the next `horizon` positions, w_i = exp(tau (cos(q, k_i) - the largest cosine)) and
    M = I + sum_i (w_i + eps) v_i v_i^T; s_i = w_i v_i . M^-1 v_i, mean of the group. The first `sinks` tokens stay and do not
    take part.

    Args:
        tau: sharpness of the weights.
        horizon: positions to come.
        sinks: tokens at the beginning.
        eps: added to every weight.
    Source: arXiv:2604.25975.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"moments", "rope"})
    tau: float = 5.0
    horizon: int = 512
    sinks: int = 4
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.sinks < 0:
            raise OptionError(
                f"horizon={self.horizon}, sinks={self.sinks} is not allowed; they count tokens, 1 or more and 0 or more"
            )

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        mean, _ = _to_come(ctx, ctx.moments.mean, None, horizon=self.horizon)
        anchor = F.normalize(mean, dim=-1).unflatten(1, (-1, ctx.groups))  # [B, Hkv, G, D]
        keys = F.normalize(ctx.stored.keys.float(), dim=-1)
        part = (ctx.rank >= self.sinks).expand(ctx.stored.shape)
        values = ctx.stored.values.float().masked_fill(~part[..., None], 0)
        cosine = (anchor @ keys.mT).clamp(-1, 1).masked_fill(~part[:, :, None], -torch.inf)  # [B, Hkv, G, S]
        weights = (self.tau * (cosine - cosine.amax(-1, keepdim=True).clamp(min=-1))).exp()
        eye = torch.eye(values.shape[-1], device=values.device)
        total = torch.zeros(ctx.stored.shape, device=values.device)
        for weight in weights.unbind(2):  # one query head of a group at a time: values are never repeated
            factor = torch.linalg.cholesky_ex(eye + (values * (weight + self.eps)[..., None]).mT @ values)[0]
            solved = torch.linalg.solve_triangular(factor, values.mT, upper=False)
            total += weight * solved.square().sum(-2)
        return must_stay(total / ctx.groups, ctx, sink=self.sinks)
