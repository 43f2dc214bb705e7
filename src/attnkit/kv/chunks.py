"""Selectors that look at stretches of tokens, and the wrappers that put them into a press."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnkit._core.errors import OptionError
from attnkit.kv.context import ScoreContext
from attnkit.kv.line import Line
from attnkit.kv.registry import wrapper
from attnkit.kv.selectors import Kept, TopK, best

__all__ = ["Blockwise", "ChunkTopK", "EntropyGatedChunks", "WholeChunks", "selecting"]


def selecting(press: Any, selector: Any) -> Any:
    """`press` with another selector.

    Raises:
        OptionError: what the press keeps is not the highest scores, so there is nothing to replace.
    """
    if not isinstance(press.selector, TopK):
        raise OptionError(
            f"{type(selector).__name__} chooses by scores, and so does {type(press.selector).__name__}; use one of them"
        )
    return replace(press, selector=selector)


def _check(length: int) -> None:
    if length < 1:
        raise OptionError(f"length={length} is not allowed; it counts tokens, 1 or more")


@dataclass(frozen=True)
class ChunkTopK:
    """The highest scores of each chunk, so that every part of the text keeps its share.

    The shares of a head's chunks add up to its count.

    Args:
        length: tokens a chunk.
    """

    length: int = 1024

    def __post_init__(self) -> None:
        _check(self.length)

    def select(self, ctx: ScoreContext, scores: Tensor, counts: int | Tensor, scorer: Any) -> Kept:
        """The highest of each chunk."""
        del scorer
        line = Line.of(ctx)
        inside = line.take(scores).masked_fill(~line.live, -torch.inf)
        chunks = -(-line.size // self.length)
        edges = torch.arange(chunks + 1, device=line.device) * self.length
        shares = torch.minimum(edges, line.counts) * _each(counts, scores)[..., None] // line.counts.clamp(min=1)
        quota = shares.diff(dim=-1)  # [B, Hkv, chunks]
        chunk = (torch.arange(line.size, device=line.device) // self.length).expand_as(inside)
        first = chunk * self.length
        order = inside.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, chunk.gather(-1, order).argsort(dim=-1, stable=True))  # by chunk, best first
        place = torch.arange(line.size, device=line.device) - first
        chosen = (place < quota.gather(-1, chunk)) & line.live
        mask = torch.zeros_like(chosen).scatter(-1, order, chosen)
        return _of_mask(line.put(mask), counts)


@dataclass(frozen=True)
class WholeChunks:
    """Whole chunks of tokens, those with the highest mean score; all heads of a row keep the same chunks.

    The last chunk that is taken gives its best tokens only, as many as are left of the count. Heads that store different
    tokens, after an earlier compression, are matched by order.

    Args:
        length: tokens a chunk.
    Source: Liu et al. 2025 (ChunkKV), arXiv:2502.00299.
    """

    length: int = 20

    def __post_init__(self) -> None:
        _check(self.length)

    def select(self, ctx: ScoreContext, scores: Tensor, counts: int | Tensor, scorer: Any) -> Kept:
        """Chunks in the order of their score, until the count is reached."""
        del scorer
        line = Line.of(ctx)
        inside = line.take(scores).masked_fill(~line.live, -torch.inf)
        chunk = torch.arange(line.size, device=line.device) // self.length
        mean, _ = _chunked(inside, self.length)
        turn = _places(mean)[..., chunk].expand_as(inside)  # when the token's chunk has its turn
        order = inside.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, turn.gather(-1, order).argsort(dim=-1, stable=True))
        return _taken(line, order, counts)


@dataclass(frozen=True)
class EntropyGatedChunks:
    """Whole chunks, of which those with a few outstanding tokens give only these.

    Scores are summed over heads, and all heads of a row keep the same tokens. A chunk whose mean score is at least the median
    and whose scores' entropy (over its maximum) is below the median gives its best `short` tokens. What is left of the count
    goes to the best tokens of all.

    Args:
        length: tokens a chunk.
        short: tokens of a gated chunk, fewer than `length`.
    Source: an extension of ChunkKV (arXiv:2502.00299) by the authors of kvpress.
    """

    length: int = 10
    short: int = 4

    def __post_init__(self) -> None:
        _check(self.short)
        if self.length <= self.short:
            raise OptionError(
                f"length={self.length} is not allowed with short={self.short}; a chunk has more tokens than it may give"
            )

    def select(self, ctx: ScoreContext, scores: Tensor, counts: int | Tensor, scorer: Any) -> Kept:
        """First what the chunks give, in the order of their score, then the best of the rest."""
        del scorer
        line = Line.of(ctx)
        summed = line.take(scores).masked_fill(~line.live, 0).sum(1, keepdim=True)
        live = line.live.any(1, keepdim=True).expand(summed.shape)
        shared = summed.masked_fill(~live, -torch.inf)
        mean, size = _chunked(shared, self.length)
        entropy = self._entropy(shared, size)
        gated = (mean >= _median(mean, size)) & (entropy < _median(entropy, size))
        chunk = (torch.arange(line.size, device=line.device) // self.length).expand_as(shared)
        order = shared.argsort(dim=-1, descending=True, stable=True)
        by_chunk = order.gather(-1, chunk.gather(-1, order).argsort(dim=-1, stable=True))
        place = torch.empty_like(order).scatter_(-1, by_chunk, torch.arange(line.size, device=line.device).expand_as(order))
        place = place - chunk * self.length  # of each token among those of its chunk
        given = place < torch.where(gated, self.short, self.length).gather(-1, chunk)
        turn = torch.where(given, _places(mean).gather(-1, chunk), mean.shape[-1])
        order = order.gather(-1, turn.gather(-1, order).argsort(dim=-1, stable=True)).expand(ctx.stored.shape)
        return _taken(line, order, counts)

    def _entropy(self, shared: Tensor, size: Tensor) -> Tensor:
        """[B, 1, chunks], of the scores in each chunk as shares of their sum, over the logarithm of its size."""
        parts = _parts(shared, self.length)
        parts = parts.masked_fill(parts == -torch.inf, torch.inf)
        parts = (parts - parts.amin(-1, keepdim=True).clamp(max=0)).masked_fill(parts == torch.inf, 0)
        share = parts / (parts.sum(-1, keepdim=True) + 1e-8)
        entropy = -(share * (share + 1e-8).log()).sum(-1)
        return torch.where(size > 1, entropy / size.clamp(min=2).log(), 0).clamp(0, 1)


@dataclass(frozen=True)
class Blockwise:
    """The highest scores, found as if the context came in blocks: keep some, add a block, score anew, keep as many again.

    This is what a prefill with bounded memory would keep. Queries are those of the whole context.

    Args:
        length: tokens a block.
    """

    length: int = 128

    def __post_init__(self) -> None:
        _check(self.length)

    def select(self, ctx: ScoreContext, scores: Tensor, counts: int | Tensor, scorer: Any) -> Kept:
        """The last choice."""
        first = _each(counts, scores)[..., None]
        rank = ctx.rank.expand(scores.shape)
        left = scores.shape[-1] - (counts if isinstance(counts, int) else 0)  # the least count is not known on the host
        chosen = (rank >= 0) & (rank < first)
        for step in range(-(-left // self.length)):
            begin = first + step * self.length
            seen = chosen | ((rank >= begin) & (rank < begin + self.length))
            part = Kept.of_mask(seen)
            if isinstance(counts, int):
                part = Kept(part.index[..., : counts + self.length], part.lengths)
            some = ctx.restricted(part.index, part.live())
            fresh = scorer.score(some).masked_fill(~part.live(), -torch.inf)
            keep = best(fresh, torch.minimum(_each(counts, scores), seen.sum(-1)))
            chosen = replace(part, index=part.index.gather(-1, keep.index), lengths=keep.lengths).mask(scores.shape[-1])
        return _of_mask(chosen, counts)


def _each(counts: int | Tensor, like: Tensor) -> Tensor:
    """`counts` as [B, Hkv] int64."""
    return torch.full(like.shape[:2], counts, device=like.device) if isinstance(counts, int) else counts


def _of_mask(mask: Tensor, counts: int | Tensor) -> Kept:
    kept = Kept.of_mask(mask)
    return Kept(kept.index[..., :counts]) if isinstance(counts, int) else kept


def _taken(line: Line, order: Tensor, counts: int | Tensor) -> Kept:
    """The first `counts` tokens of `order` [B, Hkv, S], places of the line; places without a token do not count."""
    dead = (~line.live).expand_as(order).gather(-1, order)
    order = order.gather(-1, dead.to(torch.int8).argsort(dim=-1, stable=True))
    first = torch.arange(line.size, device=line.device) < _each(counts, order)[..., None]
    mask = torch.zeros_like(first.expand_as(order)).scatter(-1, order, first.expand_as(order))
    return _of_mask(line.put(mask), counts)


def _parts(scores: Tensor, length: int) -> Tensor:
    """[B, *, S] -> [B, *, chunks, length], filled up with -inf."""
    fill = -scores.shape[-1] % length
    parts: Tensor = torch.nn.functional.pad(scores, (0, fill), value=-torch.inf).unflatten(-1, (-1, length))
    return parts


def _chunked(scores: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Mean score of each chunk, summed over heads, -inf where it has no token; and its tokens; both [B, 1, chunks]."""
    parts = _parts(scores, length)
    live = parts > -torch.inf
    count = live.sum(-1)
    mean = (parts.masked_fill(~live, 0).sum(-1) / count.clamp(min=1)).sum(1, keepdim=True)
    size = count.amax(1, keepdim=True)
    return mean.masked_fill(size == 0, -torch.inf), size


def _places(scores: Tensor) -> Tensor:
    """Each entry's place when they stand in descending order."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(-1, order, torch.arange(scores.shape[-1], device=order.device).expand_as(order))


def _median(x: Tensor, size: Tensor) -> Tensor:
    """The lower median of the chunks that have tokens, [B, 1, 1]."""
    ordered = x.masked_fill(size == 0, torch.inf).sort(-1).values
    return ordered.gather(-1, ((size > 0).sum(-1, keepdim=True) - 1).clamp(min=0) // 2)


@wrapper("chunk")
def _chunk(press: Any, chunk_length: int = 1024) -> Any:
    """Each chunk of the context keeps its own best keys."""
    return selecting(press, ChunkTopK(chunk_length))


@wrapper("chunkkv")
def _chunkkv(press: Any, chunk_length: int = 20) -> Any:
    """Whole chunks of neighbouring tokens stay or go.

    Source: Liu et al. 2025 (ChunkKV), arXiv:2502.00299.
    """
    return selecting(press, WholeChunks(chunk_length))


@wrapper("entropy_chunkkv")
def _entropy_chunkkv(press: Any, chunk_length: int = 10, short_length: int = 4) -> Any:
    """Whole chunks, of which those with a few outstanding tokens give only these."""
    return selecting(press, EntropyGatedChunks(chunk_length, short_length))


@wrapper("block")
def _block(press: Any, block_length: int = 128) -> Any:
    """Scores block by block, each with what earlier blocks have left."""
    if press.needs & {"queries", "hidden", "replay"}:
        raise OptionError(
            "block scores parts of the keys anew; it goes around methods that need no more than keys and the newest queries"
        )
    return selecting(press, Blockwise(block_length))
