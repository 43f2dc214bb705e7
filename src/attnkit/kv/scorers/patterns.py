"""Methods that go by the pattern of a head's or a layer's attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnkit._core.errors import OptionError, PolicyError, ShapeError
from attnkit.kv.budgets import each
from attnkit.kv.context import Rotation, ScoreContext
from attnkit.kv.line import must_stay
from attnkit.kv.pressing import Press
from attnkit.kv.registry import base, scorer
from attnkit.kv.scorers.simple import Streaming
from attnkit.kv.weights import table

__all__ = ["Ends", "Finch", "LazyLayers", "StreamingHeads", "StreamingHeadsOfPrompt", "retrieval_scores"]


@scorer("finch")
@dataclass(frozen=True)
class Finch:
    """What the question at the end of a prompt looks at: the newest `window` tokens are the question.

    s_i = mean over the question's tokens t of n_t a_ti, mean over the group, with n_t the number of tokens before t: rows of
    attention over more keys count as much as those over fewer. The question stays. "chunk:finch" chooses chunk by chunk,
    and "rerotate:finch" turns what stays to positions without gaps; the paper does both.

    Args:
        window: tokens of the question.
    Source: Corallo and Papotti 2024 (FINCH), doi 10.1162/tacl_a_00716.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    window: int = 64

    def __post_init__(self) -> None:
        if self.window < 1:
            raise OptionError(f"window={self.window} is not allowed; it counts the question's tokens, 1 or more")

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        weights = ctx.mean_over_group(ctx.attention(self.window))
        positions = ctx.query_positions[:, -self.window :]
        older = ctx.stored.positions[:, :, None] < positions[:, None, :, None]
        if ctx.stored.real is not None:
            older = older & ctx.stored.real[:, :, None]
        asked = ctx.query_real
        count = weights.shape[2] if asked is None else asked[:, -self.window :].sum(-1).clamp(min=1)[:, None, None]
        scores = (weights * older.sum(-1, keepdim=True)).sum(2) / count
        return must_stay(scores, ctx, recent=self.window)


@dataclass(frozen=True)
class Ends:
    """The first tokens and, behind them, newer before older.

    Args:
        initial: first tokens, worth most.
        window: newest queries that a budget wants to look at.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    initial: int
    window: int

    def score(self, ctx: ScoreContext) -> Tensor:
        """[B, Hkv, S] float32."""
        return Streaming(self.initial).score(ctx)


@dataclass(frozen=True)
class LazyLayers:
    """Layers whose attention goes to both ends of the text keep these alone; the others keep everything.

    Args:
        threshold: the share of attention from which on a layer is lazy.
        initial, recent: tokens at both ends.
        window: newest queries that are looked at.
    """

    threshold: float
    initial: int
    recent: int
    window: int

    def counts(self, ctx: ScoreContext, scores: Tensor, kept: int | Tensor) -> Tensor:
        """[B, Hkv] int64; `kept`, and so the press's ratio, means nothing here."""
        del kept
        length = each(ctx.stored.length, scores)
        ends = (ctx.rank < self.initial) | (length[..., None] - ctx.rank <= self.recent)
        if ctx.stored.real is not None:
            ends = ends & ctx.stored.real
        weights = ctx.attention(self.window)  # a row of padding has none
        mass = (ctx.mean_over_group(weights.sum(2)) * ends).sum((1, 2))
        rows = weights.sum((1, 2, 3)) / ctx.groups
        lazy = mass > self.threshold * rows if self.threshold < 1 else torch.zeros_like(rows, dtype=torch.bool)
        return torch.where(lazy[:, None], length.clamp(max=self.initial + self.recent), length)


@base("simlayerkv")
def _simlayerkv(lazy: float = 0.9, initial: int = 4, recent: int = 1024, window: int = 1) -> Press:
    """Lazy layers keep the first and the newest tokens, the others everything.

    A layer is lazy where the newest queries give more than `lazy` of their attention (mean over heads and queries) to
    these tokens. Each row of a batch decides for itself, and the queries' own keys count among the newest. How much is
    removed follows from the text; the ratio is not used.

    Args:
        lazy: 0 to 1; at 1 no layer is lazy. Published: 0.9 for Llama 3, 0.65 Llama 2, 0.8 Mistral, 0.85 Qwen.
        initial, recent: tokens at both ends.
        window: newest queries that are looked at.
    Source: Zhang et al. 2024 (SimLayerKV), arXiv:2410.13846.
    """
    if not 0 <= lazy <= 1:
        raise OptionError(f"lazy={lazy} is not allowed; it is a share of attention, from 0 to 1")
    for name, value in (("initial", initial), ("recent", recent)):
        if value < 0:
            raise OptionError(f"{name}={value} is not allowed; it counts tokens, 0 or more")
    if window < 1:
        raise OptionError(f"window={window} is not allowed; it counts queries, 1 or more")
    return Press(Ends(initial, window), budget=LazyLayers(lazy, initial, recent, window))


@dataclass(frozen=True)
class StreamingHeads:
    """The heads with the lowest scores of a table keep the first and the newest tokens, the others everything.

    Args:
        pattern: path of the table [layers, Hkv]: lines of numbers (`.tsv`), `.npy`, or "duo" of a safetensors file.
        sink, recent: tokens at both ends.
    """

    pattern: str
    sink: int
    recent: int

    def counts(self, ctx: ScoreContext, scores: Tensor, kept: int | Tensor) -> Tensor:
        """[B, Hkv] int64.

        Raises:
            ShapeError: the table is another model's.
        """
        del kept
        pattern = table(self.pattern, "duo", 2).clamp(0, 1)
        if pattern.shape != (ctx.layers, scores.shape[1]):
            raise ShapeError(
                f"{self.pattern} has shape {tuple(pattern.shape)}; this model needs [{ctx.layers}, {scores.shape[1]}]"
            )
        streaming = _lowest(pattern.flatten()[None], ctx.ratio).unflatten(1, pattern.shape)[:, ctx.index]
        return _ends(streaming.to(scores.device), each(ctx.stored.length, scores), self.sink + self.recent)


@dataclass(frozen=True)
class StreamingHeadsOfPrompt:
    """As `StreamingHeads`, with scores from the prompt itself.

    Args:
        sink, recent: tokens at both ends.
    """

    sink: int
    recent: int

    def counts(self, ctx: ScoreContext, scores: Tensor, kept: int | Tensor) -> Tensor:
        """[B, Hkv] int64: one layer alone."""
        return self.share([ctx], [scores], [kept])[0]

    def share(self, contexts: list[ScoreContext], scores: list[Tensor], kept: list[int | Tensor]) -> list[Tensor]:
        """[B, Hkv] int64 of each layer."""
        del kept
        found = torch.cat([_of_prompt(ctx) for ctx in contexts], dim=1)
        streaming = _lowest(found, contexts[0].ratio).split([score.shape[1] for score in scores], dim=1)
        lengths = [each(ctx.stored.length, score) for ctx, score in zip(contexts, scores, strict=True)]
        return [_ends(*pair, self.sink + self.recent) for pair in zip(streaming, lengths, strict=True)]


def _ends(streaming: Tensor, length: Tensor, most: int) -> Tensor:
    return torch.where(streaming, length.clamp(max=most), length)


def _lowest(found: Tensor, ratio: float) -> Tensor:
    """Which of [B, heads] are the lowest round(ratio heads)."""
    order = found.argsort(dim=-1, stable=True)
    chosen = torch.arange(found.shape[-1], device=found.device) < round(found.shape[-1] * ratio)
    return torch.zeros_like(found, dtype=torch.bool).scatter(-1, order, chosen.expand_as(order))


def _of_prompt(ctx: ScoreContext) -> Tensor:
    if ctx.rope is None:
        raise PolicyError("duo_attention without a pattern needs the model's rotation")
    stored = ctx.stored
    # keys and queries of a row were rotated to positions that differ from their places by the same number
    places = stored.positions + (ctx.query_turned[:, -1:] - ctx.query_positions[:, -1:])[:, None]
    places = places.expand(stored.shape).flatten(0, 1)  # heads may hold tokens of their own
    keys = ctx.rope.rotate(stored.keys.float().flatten(0, 1)[:, :, None], -places)[:, :, 0].unflatten(0, stored.shape[:2])
    if stored.real is None:
        mean_key = keys.mean(2)
    else:
        real = stored.real.expand(stored.shape)[..., None]
        mean_key = keys.masked_fill(~real, 0).sum(2) / real.sum(2).clamp(min=1)
    return retrieval_scores(ctx.moments.mean, mean_key, ctx.rope, ctx.scale)


def retrieval_scores(mean_query: Tensor, mean_key: Tensor, rope: Rotation, scale: float, length: int = 500) -> Tensor:
    """How far back heads look by their positions alone: high where attention is spread over the whole text.

    The last of `length` equal mean queries looks at as many equal mean keys, each turned to its position; the score is the
    area under the cumulated attention, from the first token on, mean over the group.

    Args:
        mean_query: [B, H, D], not rotated.
        mean_key: [B, Hkv, D], not rotated.
        rope: the model's rotation.
        scale: of the scores.
        length: of the imagined text.
    Returns:
        [B, Hkv] float32, between 0 and 1.
    """
    place = torch.arange(length, device=mean_key.device)
    keys = rope.rotate(mean_key[:, None].float().expand(-1, length, -1, -1).contiguous(), place)
    query = rope.rotate(mean_query[:, None].float(), place[-1:])[:, 0].unflatten(1, (mean_key.shape[1], -1))
    weights = torch.softmax(torch.einsum("bkgd,bskd->bkgs", query, keys) * scale, dim=-1)
    return weights.cumsum(-1).mean((-2, -1))


@dataclass(frozen=True)
class _StreamingWithMoments(Streaming):
    """As `Streaming`, for a budget that looks at the mean query."""

    needs: ClassVar[frozenset[str]] = frozenset({"moments", "rope"})


@base("duo_attention")
def _duo_attention(pattern: str | None = None, sink: int = 128, recent: int = 256) -> Press:
    """Retrieval heads keep everything, streaming heads the first and the newest tokens.

    The ratio is the fraction of all heads that stream: those with the lowest scores in a pattern that was learnt for the
    model, or measured by `attnkit.inference.calibrate`. Without a pattern the prompt itself is measured, see
    `retrieval_scores`, and each row of a batch has streaming heads of its own.

    Args:
        pattern: path of the table [layers, Hkv]: lines of numbers (`.tsv`), `.npy`, or "duo" of a safetensors file.
        sink, recent: tokens that streaming heads keep; a pattern says for how many it was learnt.
    Source: Xiao et al. 2024 (DuoAttention), arXiv:2410.10819.
    """
    for name, value in (("sink", sink), ("recent", recent)):
        if value < 1:
            raise OptionError(f"{name}={value} is not allowed; it counts tokens, 1 or more")
    if pattern is None:
        return Press(_StreamingWithMoments(sink), budget=StreamingHeadsOfPrompt(sink, recent))
    return Press(Streaming(sink), budget=StreamingHeads(str(pattern), sink, recent))
